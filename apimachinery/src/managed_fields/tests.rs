//! Tables from what Kubernetes' documentation and its own tests say about field management.

use super::*;
use crate::facts;
use serde_json::json;

const NOW: &str = "2026-01-01T00:00:00Z";

/// An object under field management, without the API around it.
#[derive(Clone)]
pub struct Managed {
    place: Place,
    pub object: Value,
    pub managed: ManagedFields,
    version: &'static str,
    clock: u32,
}

impl Managed {
    pub fn new(group: &'static str, version: &'static str, kind: &str) -> Self {
        let place = Place::Struct(facts::schema_of(group, version, kind).unwrap());
        let version = if group.is_empty() { version } else { "apps/v1" };
        Self { place, object: json!({}), managed: ManagedFields::default(), version, clock: 0 }
    }

    fn tick(&mut self) -> String {
        self.clock += 1;
        format!("2026-01-01T00:00:{:02}Z", self.clock)
    }

    pub fn update(&mut self, manager: &str, new: Value) {
        self.update_of("", &Ignored::Nothing, manager, new);
    }

    pub fn update_of(&mut self, subresource: &str, ignored: &Ignored, manager: &str, new: Value) {
        let now = self.tick();
        let writer = Writer { manager, api_version: self.version, subresource };
        self.managed.update(self.place, &self.object, &new, &writer, ignored, &now, None);
        self.object = new;
        self.reread();
    }

    pub fn apply(&mut self, manager: &str, force: bool, config: &Value) -> Result<(), Vec<Conflict>> {
        let now = self.tick();
        let writer = Writer { manager, api_version: self.version, subresource: "" };
        let exists = self.object != json!({});
        let applied = apply(
            self.place,
            &self.object,
            exists,
            config,
            self.managed.clone(),
            &writer,
            force,
            &Ignored::Nothing,
            &now,
            None,
            |merged| Ok::<_, ()>(plain(merged)),
        );
        match applied {
            Ok(applied) => (self.object, self.managed) = (applied.object, applied.managed),
            Err(ApplyError::Conflicts(conflicts)) => return Err(conflicts),
            Err(ApplyError::Invalid(())) => unreachable!(),
        }
        self.reread();
        Ok(())
    }

    /// What has been written is what is read.
    fn reread(&mut self) {
        let again = ManagedFields::parse(&self.managed.write()).unwrap();
        assert!(again.equals_but_for_times(&self.managed), "{}", self.managed.write());
        self.managed = again;
    }

    pub fn fields_of(&self, manager: &str) -> String {
        let mut fields = FieldSet::default();
        let entries = self.managed.entries.iter().filter(|entry| entry.manager == manager);
        entries.for_each(|entry| fields.add(entry.fields.set()));
        fields.to_string()
    }
}

/// Without nulls and what is empty, as the decoder leaves an object.
fn plain(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .map(|(k, v)| (k, plain(v)))
                .filter(|(_, v)| !v.is_null() && *v != json!([]) && *v != json!({}))
                .collect(),
        ),
        Value::Array(list) => Value::Array(list.into_iter().map(plain).collect()),
        other => other,
    }
}

fn deployment(replicas: i64, image: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "web", "labels": {"app": "web"}, "uid": "u", "resourceVersion": "1"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [
                {"name": "web", "image": image, "ports": [{"containerPort": 80, "protocol": "TCP"}]}]}}}})
}

#[test]
fn a_creator_owns_what_kubernetes_says_it_owns() {
    let mut object = Managed::new("apps", "v1", "Deployment");
    object.update("kubectl-create", deployment(1, "nginx"));
    assert_eq!(
        object.fields_of("kubectl-create"),
        concat!(
            r#"{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"f:spec":{"f:replicas":{},"f:selector":{},"#,
            r#""f:strategy":{"f:rollingUpdate":{".":{},"f:maxSurge":{}},"f:type":{}},"f:template":{"f:metadata":{"f:labels":{".":{},"f:app":{}}},"#,
            r#""f:spec":{"f:containers":{"k:{\"name\":\"web\"}":{".":{},"f:image":{},"f:name":{},"f:ports":{".":{},"#,
            r#""k:{\"containerPort\":80,\"protocol\":\"TCP\"}":{".":{},"f:containerPort":{},"f:protocol":{}}},"f:resources":{}}}}}}}"#
        )
    );
    let text = object.managed.write();
    assert!(text.starts_with(
        r#"[{"manager":"kubectl-create","operation":"Update","apiVersion":"apps/v1","time":"2026-01-01T00:00:01Z","fieldsType":"FieldsV1","fieldsV1":{"f:metadata""#
    ));
}

#[test]
fn an_update_takes_what_it_changes_and_a_status_has_owners_of_its_own() {
    let mut object = Managed::new("apps", "v1", "Deployment");
    object.update("a", deployment(1, "nginx"));
    object.update("b", deployment(2, "nginx"));
    assert_eq!(object.fields_of("b"), r#"{"f:spec":{"f:replicas":{}}}"#);
    assert!(!object.fields_of("a").contains("f:replicas"));
    let mut with_status = object.object.clone();
    with_status["status"] = json!({"replicas": 2});
    with_status["spec"]["replicas"] = json!(7);
    let ignored = Ignored::Except(FieldSet::of_fields(&["spec"]));
    object.update_of("status", &ignored, "b", with_status);
    assert_eq!(object.managed.entries.len(), 3);
    assert!(object.managed.write().contains(r#""fieldsV1":{"f:status":{"f:replicas":{}}},"subresource":"status"}"#));
    let mut less = object.object.clone();
    less["spec"].as_object_mut().unwrap().remove("strategy");
    object.update("c", less);
    assert!(!object.fields_of("a").contains("f:rollingUpdate"), "what is gone is nobody's");
    assert_eq!(object.fields_of("c"), "{}");
}

#[test]
fn who_applies_owns_what_is_named_and_no_more() {
    let mut object = Managed::new("", "v1", "ConfigMap");
    let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "labels": {"a": "1"}}, "data": {"k": "v", "l": "w"}});
    object.apply("one", false, &config).unwrap();
    assert_eq!(object.fields_of("one"), r#"{"f:data":{"f:k":{},"f:l":{}},"f:metadata":{"f:labels":{"f:a":{}}}}"#);
    assert_eq!(object.object, config);

    // Another value is a conflict; the same value is shared.
    let same = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"k": "v"}});
    let other = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"k": "x"}});
    let conflicts = object.apply("two", false, &other).unwrap_err();
    assert_eq!(conflicts, [Conflict { manager: r#""one""#.into(), path: ".data.k".into() }]);
    assert_eq!(
        ApplyError::<String>::Conflicts(conflicts).to_string(),
        r#"Apply failed with 1 conflict: conflict with "one": .data.k"#
    );
    object.apply("two", false, &same).unwrap();
    assert_eq!(object.fields_of("two"), r#"{"f:data":{"f:k":{}}}"#);
    assert!(object.fields_of("one").contains("f:k"));

    // No longer named: it stays while another wants it, and goes with the last.
    let less = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"l": "w"}});
    object.apply("one", false, &less).unwrap();
    assert_eq!(object.object["data"], json!({"k": "v", "l": "w"}));
    assert_eq!(object.object["metadata"].get("labels"), None);
    let nothing = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}});
    object.apply("two", false, &nothing).unwrap();
    assert_eq!(object.object["data"], json!({"l": "w"}));
    assert_eq!(object.fields_of("two"), "{}");

    // By force.
    let mine = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"l": "mine"}});
    assert!(object.apply("two", false, &mine).is_err());
    object.apply("two", true, &mine).unwrap();
    assert_eq!((object.fields_of("one"), object.fields_of("two")), ("{}".into(), r#"{"f:data":{"f:l":{}}}"#.into()));
}

#[test]
fn conflicts_name_their_managers() {
    let mut object = Managed::new("apps", "v1", "Deployment");
    object.update("editor", deployment(1, "nginx"));
    object.apply("a", true, &json!({"spec": {"replicas": 2}})).unwrap();
    let wanted =
        json!({"spec": {"replicas": 3, "template": {"spec": {"containers": [{"name": "web", "image": "x"}]}}}});
    let conflicts = object.apply("b", false, &wanted).unwrap_err();
    assert_eq!(
        ApplyError::<String>::Conflicts(conflicts).to_string(),
        "Apply failed with 2 conflicts: conflicts with \"a\":\n- .spec.replicas\nconflicts with \"editor\" using apps/v1:\n- .spec.template.spec.containers[name=\"web\"].image"
    );
}

#[test]
fn lists_merge_by_their_type() {
    let mut object = Managed::new("", "v1", "Pod");
    let pod = |containers: Value, finalizers: Value, args: Value| json!({"metadata": {"name": "p", "finalizers": finalizers}, "spec": {"containers": containers, "dnsConfig": {"searches": args}}});
    let named = |names: &[&str]| -> Value { names.iter().map(|n| json!({"name": n, "image": "i"})).collect() };
    object.apply("one", false, &pod(named(&["a", "b"]), json!(["x", "y"]), json!(["1"]))).unwrap();
    object.apply("two", true, &pod(named(&["c", "b"]), json!(["z", "y"]), json!(["2"]))).unwrap();
    let names = |object: &Value| -> Vec<String> {
        let list = object["spec"]["containers"].as_array().unwrap();
        list.iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&object.object), ["a", "c", "b"], "keyed lists merge, in the order of the last who applied");
    assert_eq!(object.object["metadata"]["finalizers"], json!(["x", "z", "y"]), "sets merge");
    assert_eq!(object.object["spec"]["dnsConfig"]["searches"], json!(["2"]), "atomic lists are replaced");
    object.apply("one", false, &json!({"metadata": {"name": "p"}})).unwrap();
    assert_eq!(names(&object.object), ["c", "b"], "what the other wants too stays");
    assert_eq!(object.object["metadata"]["finalizers"], json!(["z", "y"]));
}

#[test]
fn a_default_key_is_a_key() {
    let mut object = Managed::new("", "v1", "Pod");
    let port = |port: Value| json!({"spec": {"containers": [{"name": "a", "ports": [port]}]}});
    object.apply("one", false, &port(json!({"containerPort": 80}))).unwrap();
    assert!(object.fields_of("one").contains(r#"k:{\"containerPort\":80,\"protocol\":\"TCP\"}"#));
    object.apply("two", false, &port(json!({"containerPort": 80, "protocol": "TCP"}))).unwrap();
    assert_eq!(object.object["spec"]["containers"][0]["ports"].as_array().unwrap().len(), 1);
}

#[test]
fn what_was_there_before_the_first_apply_has_an_owner_too() {
    let mut object = Managed::new("", "v1", "ConfigMap");
    object.object = json!({"metadata": {"name": "c", "uid": "u"}, "data": {"k": "v", "l": "w"}});
    object.update("nobody tracks it", json!({"metadata": {"name": "c", "uid": "u"}, "data": {"k": "v", "l": "w"}}));
    let conflicts = object.apply("one", false, &json!({"data": {"k": "x"}})).unwrap_err();
    assert_eq!(conflicts[0].manager, r#""before-first-apply" using v1"#);
    object.apply("one", true, &json!({"data": {"k": "x"}})).unwrap();
    assert_eq!(object.fields_of("before-first-apply"), r#"{"f:data":{".":{},"f:l":{}}}"#);
}

#[test]
fn kubectl_takes_over_what_it_applied_from_the_client_s_side() {
    let last = json!({"data": {"k": "v"}}).to_string();
    let live = json!({"metadata": {"name": "c", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": last}}, "data": {"k": "v", "l": "w"}});
    let mut object = Managed::new("", "v1", "ConfigMap");
    object.update("kubectl-client-side-apply", live);
    let config = json!({"metadata": {"name": "c"}, "data": {"k": "new"}});
    assert!(object.clone().apply("other", false, &config).is_err());
    assert!(object.clone().apply("kubectl", false, &json!({"data": {"l": "new"}})).is_err());
    object.apply("kubectl", false, &config).unwrap();
    let note = &object.object["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"];
    assert_eq!(note, &json!(format!("{config}\n")));
}

#[test]
fn the_oldest_updaters_are_lumped_together() {
    let mut object = Managed::new("", "v1", "ConfigMap");
    let mut data = json!({"metadata": {"name": "c"}, "data": {}});
    for number in 0..15 {
        data["data"][format!("k{number}")] = json!("v");
        object.update(&format!("updater-{number:02}"), data.clone());
    }
    let managers: Vec<&str> = object.managed.entries.iter().map(|e| e.manager.as_str()).collect();
    assert_eq!((managers.len(), managers[0], managers[1]), (10, "ancient-changes", "updater-06"));
    assert!(object.fields_of("ancient-changes").contains("f:k5"));
}

#[test]
fn entries_that_make_no_sense_are_refused() {
    let entry = |change: &[(&str, Value)]| {
        let mut entry = json!({"manager": "m", "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:a": {}}});
        change.iter().for_each(|(k, v)| entry[*k] = v.clone());
        json!([entry]).to_string()
    };
    assert!(ManagedFields::parse_sent(&entry(&[])).is_ok());
    for wrong in [
        entry(&[("operation", json!(""))]),
        entry(&[("apiVersion", json!(""))]),
        entry(&[("fieldsType", json!("FieldsV2"))]),
        entry(&[("fieldsV1", json!({"a": {}}))]),
        "[{}]".to_owned(),
        "{}".to_owned(),
        "[1]".to_owned(),
    ] {
        assert!(ManagedFields::parse_sent(&wrong).is_err(), "{wrong}");
    }
}

#[test]
fn what_does_not_fit_its_type_is_named() {
    let pod = Place::Struct(facts::schema("core.v1.Pod").unwrap());
    for (object, expected) in [
        (json!({"spec": {"bogus": 1}}), vec![".spec.bogus: field not declared in schema"]),
        (json!({"spec": {"priority": "x"}}), vec![".spec.priority: expected numeric (int or float), got string"]),
        (
            json!({"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}),
            vec![r#".spec.containers: duplicate entries for key [name="a"]"#],
        ),
        (
            json!({"spec": {"containers": [{"image": "a"}]}}),
            vec![
                r#".spec.containers: element 0: associative list with keys has an element that omits all key fields ["name"] (and doesn't have default values for any key fields)"#,
            ],
        ),
        (json!({"metadata": {"creationTimestamp": null}, "spec": {"nodeSelector": {"a": "b"}}}), vec![]),
    ] {
        assert_eq!(mistakes(pod, &object), expected, "{object}");
    }
}

#[test]
fn ignored_fields_come_to_nobody() {
    let place = Place::Struct(facts::schema("core.v1.Pod").unwrap());
    let mut managed = ManagedFields::default();
    let writer = Writer { manager: "m", api_version: "v1", subresource: "resize" };
    let ignored = Ignored::AllBut(&[&["f:spec", "f:containers", "*", "f:resources"]]);
    let new = json!({"spec": {"nodeName": "n", "containers": [{"name": "a", "image": "b", "resources": {"limits": {"cpu": "1"}}}]}});
    managed.update(place, &json!({"spec": {"containers": [{"name": "a"}]}}), &new, &writer, &ignored, NOW, None);
    assert!(managed.write().contains(r#""fieldsV1":{"f:spec":{"f:containers":{"k:{\"name\":\"a\"}":{"f:resources":{"f:limits":{".":{},"f:cpu":{}}}}}}}"#), "{}", managed.write());
}

#[test]
fn every_field_of_every_kind_can_be_owned() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
    let mut seen = 0;
    for kind in facts::kinds().iter().filter(|kind| kind.is_stored()) {
        let (package, _) = kind.schema.split_once('.').unwrap();
        let name = format!("{package}.{}.{}.json", kind.version, kind.kind);
        let group = if kind.group.is_empty() { "core" } else { kind.group };
        let other = format!("{group}.{}.{}.json", kind.version, kind.kind);
        let Ok(text) = std::fs::read(root.join(name)).or_else(|_| std::fs::read(root.join(other))) else { continue };
        seen += 1;
        let schema = facts::schema(kind.schema).unwrap();
        let mut object = crate::decode::decode_json(&text, schema, Default::default()).unwrap().value;
        object["metadata"].as_object_mut().unwrap().remove("managedFields");
        let place = Place::Struct(schema);
        assert_eq!(mistakes(place, &object), Vec::<String>::new(), "{}", kind.kind);

        // Applied, applied again, half of it applied; then another's, who takes nothing that is not changed.
        let mut managed = Managed::new(kind.group, kind.version, kind.kind);
        managed.apply("one", false, &object).unwrap();
        assert_eq!(managed.object, plain(object.clone()), "{}", kind.kind);
        let before = managed.managed.write();
        managed.apply("one", false, &object).unwrap();
        assert_eq!(managed.managed.write(), before, "{}", kind.kind);
        managed.apply("two", false, &object).unwrap();
        assert_eq!(managed.fields_of("one"), managed.fields_of("two"), "{}", kind.kind);
        let name = object["metadata"]["name"].clone();
        managed.apply("one", false, &json!({"metadata": {"name": name}})).unwrap();
        assert_eq!(managed.object, plain(object.clone()), "{}: the other holds it", kind.kind);

        let mut created = Managed::new(kind.group, kind.version, kind.kind);
        created.update("creator", object.clone());
        let mut expected = walk::compare(place, &json!({}), &object).changed;
        assert_eq!(text::of_new(place, &object, &FieldSet::default(), &FieldSet::default()), expected.to_string());
        expected.subtract(&NOBODYS);
        assert_eq!(text::of_new(place, &object, &NOBODYS, &FieldSet::default()), expected.to_string());
        let all = FieldSet::parse(&created.fields_of("creator")).unwrap();
        let mut missing = FieldSet::parse(&managed.fields_of("two")).unwrap();
        missing.subtract(&all);
        assert!(missing.is_empty(), "{}: {missing}", kind.kind);
    }
    if seen == 0 {
        println!("skipped: {} is absent", root.display());
    } else {
        assert!(seen > 50, "{seen}");
    }
}

/// A kind of two versions: what is `data` in v1 is `binaryData` in v2.
fn renamed(object: &Value, from: &str, to: &str) -> Option<(Place, Value)> {
    let place = Place::Struct(facts::schema("core.v1.ConfigMap").unwrap());
    let (was, is) = match (from, to) {
        ("v1", "v2") => ("data", "binaryData"),
        ("v2", "v1") => ("binaryData", "data"),
        (a, b) if a == b => ("data", "data"),
        _ => return None,
    };
    let mut object = object.clone();
    if let Some(value) = object.as_object_mut().and_then(|map| map.remove(was)) {
        object[is] = value;
    }
    Some((place, object))
}

#[test]
fn fields_are_compared_in_the_version_in_which_they_are_owned() {
    let place = Place::Struct(facts::schema("core.v1.ConfigMap").unwrap());
    let writer = |manager, api_version| Writer { manager, api_version, subresource: "" };
    let applied = |live: &Value, managed: &ManagedFields, config: Value, by: &Writer<'_>, force| {
        let exists = *live != json!({});
        let finish = |merged| Ok::<_, ()>(merged);
        apply(place, live, exists, &config, managed.clone(), by, force, &Ignored::Nothing, NOW, Some(&renamed), finish)
    };
    let one = writer("one", "v1");
    let made =
        applied(&json!({}), &ManagedFields::default(), json!({"data": {"a": "x", "b": "y"}}), &one, false).unwrap();
    // Another says otherwise of it, in the other version.
    let (_, live) = renamed(&made.object, "v1", "v2").unwrap();
    let two = writer("two", "v2");
    let error = applied(&live, &made.managed, json!({"binaryData": {"a": "z"}}), &two, false).unwrap_err();
    assert_eq!(
        error,
        ApplyError::Conflicts(vec![Conflict { manager: "\"one\"".to_owned(), path: ".data.a".to_owned() }])
    );
    let forced = applied(&live, &made.managed, json!({"binaryData": {"a": "z"}}), &two, true).unwrap();
    let text = forced.managed.write();
    assert!(text.contains(r#"{"f:data":{".":{},"f:b":{}}}"#) || text.contains(r#"{"f:data":{"f:b":{}}}"#), "{text}");
    // Who applies anew in the other version drops what was applied in the first.
    let anew = writer("one", "v2");
    let dropped = applied(&live, &made.managed, json!({"binaryData": {"a": "x"}}), &anew, false).unwrap();
    assert_eq!(dropped.object, json!({"binaryData": {"a": "x"}}));
    // And an update takes from the owner what it changes. A version that is no more owns nothing.
    let mut managed =
        ManagedFields::parse(&made.managed.write().replace("\"one\"", "\"gone\"").replace("v1\"", "v0\"")).unwrap();
    managed.entries.extend(made.managed.entries.clone());
    let new = json!({"binaryData": {"a": "x", "b": "changed"}});
    managed.update(place, &live, &new, &two, &Ignored::Nothing, NOW, Some(&renamed));
    let text = managed.write();
    assert!(!text.contains("gone") && !text.contains(r#"f:data":{".":{},"f:a":{},"f:b"#), "{text}");
    assert!(text.contains(r#""f:binaryData":{"f:b":{}}"#), "{text}");
}
