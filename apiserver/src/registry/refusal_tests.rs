//! What each kind refuses, and with which words: the tables of `refusals/`, held against the rules. An expectation is how an
//! error begins; a case without one is accepted.

use super::builtin::{Builtin, Settings};
use super::object::set;
use super::strategy::{Part, Strategy as _};
use apimachinery::decode::{FieldValidation, decode_value};
use apimachinery::facts::{self, KindFacts};
use apimachinery::meta::Gvk;
use base64::Engine as _;
use serde_json::{Map, Value, json};

const TABLES: [&str; 5] = ["admission.yaml", "cluster.yaml", "devices.yaml", "network.yaml", "workloads.yaml"];

const VERBS: [(&str, Option<Part>); 5] = [
    ("create", None),
    ("warnings", None),
    ("update", Some(Part::Main)),
    ("status", Some(Part::Status)),
    ("approval", Some(Part::Approval)),
];

/// Writes values at JSON pointers, making what is not there; null removes.
fn write(object: &mut Value, changes: &Map<String, Value>) {
    for (pointer, value) in changes {
        let names: Vec<String> =
            pointer.split('/').skip(1).map(|name| name.replace("~1", "/").replace("~0", "~")).collect();
        let (last, parents) = names.split_last().expect("a pointer");
        let mut at = &mut *object;
        for name in parents {
            at = match (at, name.parse::<usize>()) {
                (Value::Array(list), Ok(index)) => &mut list[index],
                (at, _) => super::object::child(at, name),
            };
        }
        match (at, last.parse::<usize>(), value) {
            (Value::Array(list), Ok(index), Value::Null) => _ = list.remove(index),
            (Value::Array(list), Ok(index), value) if index < list.len() => list[index] = value.clone(),
            (Value::Array(list), _, value) => list.push(value.clone()),
            (at, _, Value::Null) => _ = super::object::remove(at, last),
            (at, _, value) => set(at, last, value.clone()),
        }
    }
}

struct Subject {
    strategy: Builtin,
    facts: &'static KindFacts,
    base: Value,
}

impl Subject {
    fn decoded(&self, object: Value) -> Result<Value, Vec<String>> {
        let schema = facts::schema_of(self.facts.group, self.facts.version, self.facts.kind).unwrap();
        decode_value(object, schema, FieldValidation::Strict)
            .map(|decoded| decoded.value)
            .map_err(|error| vec![error.message(self.facts.version, self.facts.kind)])
    }

    /// The object as a POST leaves it, and what is wrong with it.
    fn create(&self, changes: &Map<String, Value>) -> (Value, Vec<String>) {
        let mut object = self.base.clone();
        write(&mut object, changes);
        let mut object = match self.decoded(object) {
            Ok(object) => object,
            Err(errors) => return (Value::Null, errors),
        };
        self.strategy.defaults(&mut object);
        if self.facts.subresource("status").is_some() && !self.strategy.keeps_status_on_create() {
            super::object::remove(&mut object, "status");
        }
        crate::endpoints::metadata::fill_system_fields(&mut object, self.strategy.tracks_generation());
        self.strategy.prepare_for_create(&mut object);
        let errors = self.strategy.validate(&object);
        (object, errors.iter().map(ToString::to_string).collect())
    }

    /// What is wrong with a PUT of the object with changes.
    fn update(&self, part: Part, was: &Map<String, Value>, changes: &Map<String, Value>) -> Vec<String> {
        let (mut old, _) = self.create(&Map::new());
        set(super::object::child(&mut old, "metadata"), "resourceVersion", "1");
        write(&mut old, was);
        let mut new = old.clone();
        write(&mut new, changes);
        let mut new = match self.decoded(new) {
            Ok(new) => new,
            Err(errors) => return errors,
        };
        self.strategy.defaults(&mut new);
        if part == Part::Main && self.facts.subresource("status").is_some() {
            super::object::copy_field(&mut new, &old, "status");
        }
        self.strategy.prepare_for_update(part, &mut new, &old);
        self.strategy.validate_update(part, &new, &old).iter().map(ToString::to_string).collect()
    }
}

fn subject(kind: &str, base: Option<&Value>, small: &[Value]) -> Subject {
    let (api_version, name) = kind.split_once(' ').unwrap_or_else(|| panic!("{kind}"));
    let gvk = Gvk::from_api_version(api_version, name);
    let facts = facts::kind(&gvk.group, &gvk.version, &gvk.kind).unwrap_or_else(|| panic!("{kind}"));
    let mut base = match base {
        Some(base) => base.clone(),
        None => small
            .iter()
            .find(|o| o["apiVersion"] == api_version && o["kind"] == name)
            .cloned()
            .unwrap_or_else(|| panic!("no small {kind}")),
    };
    set(&mut base, "apiVersion", api_version);
    set(&mut base, "kind", name);
    let meta = super::object::child(&mut base, "metadata");
    super::object::default(meta, "name", "it");
    if facts.namespaced {
        set(meta, "namespace", "here");
    }
    Subject { strategy: Builtin::new(facts, Settings::usual()), facts, base }
}

fn signing_request() -> Value {
    let key = rcgen::KeyPair::generate().unwrap();
    let request = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
    let request = base64::engine::general_purpose::STANDARD.encode(request);
    json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "spec": {"request": request, "signerName": "a.b/c", "usages": ["client auth"]}})
}

#[test]
fn every_kind_refuses_what_kubernetes_refuses_in_its_words() {
    let mut small = apimachinery::yaml::documents(include_str!("../../tests/live/objects.yaml")).unwrap();
    small.push(signing_request());
    let mut wrong = Vec::new();
    let mut cases = 0;
    for file in TABLES {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/registry/refusals").join(file);
        for kind in apimachinery::yaml::documents(&std::fs::read_to_string(path).unwrap()).unwrap() {
            let name = kind["kind"].as_str().unwrap();
            let subject = subject(name, kind.get("base"), &small);
            let base = subject.create(&Map::new()).1;
            if !base.is_empty() {
                wrong.push(format!("{file}: {name}: the base: {base:#?}"));
            }
            for (verb, part) in VERBS {
                for case in super::object::list(&kind, &format!("/{verb}")) {
                    cases += 1;
                    let case = case.as_array().unwrap_or_else(|| panic!("{name}: {case}"));
                    let maps: Vec<&Map<String, Value>> = case.iter().filter_map(Value::as_object).collect();
                    let expected: Vec<&str> = case.iter().filter_map(Value::as_str).collect();
                    let nothing = Map::new();
                    let found = match (part, maps.as_slice()) {
                        (None, [changes]) if verb == "warnings" => {
                            subject.strategy.warnings(&subject.create(changes).0, None)
                        }
                        (None, [changes]) => subject.create(changes).1,
                        (Some(part), [changes]) => subject.update(part, &nothing, changes),
                        (Some(part), [was, changes]) => subject.update(part, was, changes),
                        _ => panic!("{name}: {case:?}"),
                    };
                    let agrees =
                        found.len() == expected.len() && found.iter().zip(&expected).all(|(f, e)| f.starts_with(e));
                    if !agrees {
                        wrong.push(format!(
                            "{name}: {verb} {:?}\n   found {found:#?}\n   not {expected:#?}",
                            maps.last()
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {cases}:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_smallest_object_of_every_kind_is_accepted() {
    let small = apimachinery::yaml::documents(include_str!("../../tests/live/objects.yaml")).unwrap();
    for object in &small {
        let kind = format!("{} {}", object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap());
        let mut subject = subject(&kind, Some(object), &[]);
        if object["metadata"]["name"].is_string() {
            subject.base["metadata"]["name"] = object["metadata"]["name"].clone();
        }
        let (_, errors) = subject.create(&Map::new());
        let errors: Vec<String> = errors.into_iter().filter(|e| !e.contains("event.namespace")).collect();
        assert_eq!(errors, Vec::<String>::new(), "{kind}");
    }
}

#[test]
fn an_update_is_not_refused_for_what_was_wrong_before() {
    let small = apimachinery::yaml::documents(include_str!("../../tests/live/objects.yaml")).unwrap();
    let fault = |pointer: &str, value: Value| Map::from_iter([(pointer.to_owned(), value)]);
    let touch = fault("/metadata/annotations", json!({"a": "b"}));
    for (kind, pointer, value, worse) in [
        ("apps/v1 Deployment", "/spec/template/spec/containers/0/name", json!("No_Name"), json!("No_Name_2")),
        ("apps/v1 Deployment", "/spec/template/spec/tolerations", json!([{"key": "-"}]), json!([{"key": "--"}])),
        ("v1 Pod", "/metadata/labels", json!({"a": "?"}), json!({"a": "??"})),
        ("v1 Service", "/spec/sessionAffinity", json!("Maybe"), json!("Perhaps")),
    ] {
        let subject = subject(kind, None, &small);
        let stored = fault(pointer, value);
        assert!(!subject.create(&stored).1.is_empty(), "{kind}: a new object is refused");
        assert_eq!(subject.update(Part::Main, &stored, &touch), Vec::<String>::new(), "{kind}");
        assert!(!subject.update(Part::Main, &stored, &fault(pointer, worse)).is_empty(), "{kind}: a new fault is one");
    }
}

#[test]
fn privileged_containers_need_the_flag() {
    let small = apimachinery::yaml::documents(include_str!("../../tests/live/objects.yaml")).unwrap();
    for (kind, spec) in [
        ("v1 Pod", "/spec"),
        ("v1 PodTemplate", "/template/spec"),
        ("apps/v1 DaemonSet", "/spec/template/spec"),
        ("batch/v1 CronJob", "/spec/jobTemplate/spec/template/spec"),
    ] {
        let Subject { facts, base, .. } = subject(kind, None, &small);
        let mut settings = std::sync::Arc::into_inner(Settings::usual()).unwrap();
        settings.allow_privileged = false;
        let subject = Subject { strategy: Builtin::new(facts, std::sync::Arc::new(settings)), facts, base };
        let pointer = format!("{spec}/containers/0/securityContext/privileged");
        let path = pointer[1..].replace("/0/", "[0].").replace('/', ".");
        let (_, errors) = subject.create(&Map::from_iter([(pointer, json!(true))]));
        assert_eq!(errors, [format!("{path}: Forbidden: disallowed by cluster policy")]);
        assert_eq!(subject.create(&Map::new()).1, Vec::<String>::new());
    }
}
