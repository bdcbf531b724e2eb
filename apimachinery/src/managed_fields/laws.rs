//! Laws of ownership, over ConfigMaps (a map) and Pods (keyed lists, sets, atomic parts) that chance makes.

use super::tests::Managed;
use super::*;
use proptest::prelude::*;
use serde_json::{Map, json};

/// A configuration with some of few labels, finalizers and containers, so that managers meet.
fn config() -> impl Strategy<Value = Value> {
    let map = || prop::collection::btree_map("[a-c]", "[x-y]", 0..3);
    let container = (prop::option::of("[x-y]"), prop::option::of(Just("w")), prop::collection::btree_set(1..3u8, 0..2));
    let containers = prop::collection::btree_map("[a-c]", container, 0..3);
    (map(), prop::collection::btree_set("[a-c]", 0..3), containers, map()).prop_map(
        |(labels, finalizers, containers, node_selector)| {
            let containers: Vec<Value> = containers
                .into_iter()
                .map(|(name, (image, dir, ports))| {
                    let mut container = json!({"name": name});
                    if let Some(image) = image {
                        container["image"] = json!(image);
                    }
                    if let Some(dir) = dir {
                        container["workingDir"] = json!(dir);
                    }
                    let ports: Vec<Value> =
                        ports.iter().map(|p| json!({"containerPort": p, "protocol": "TCP"})).collect();
                    if !ports.is_empty() {
                        container["ports"] = json!(ports);
                    }
                    container
                })
                .collect();
            let mut pod = json!({"metadata": {"name": "p"}, "spec": {}});
            let mut put = |part: &str, field: &str, value: Value, empty: bool| {
                if !empty {
                    pod[part][field] = value;
                }
            };
            put("metadata", "labels", json!(labels), labels.is_empty());
            put("metadata", "finalizers", json!(finalizers), finalizers.is_empty());
            put("spec", "containers", json!(containers), containers.is_empty());
            put("spec", "nodeSelector", json!(node_selector), node_selector.is_empty());
            if pod["spec"] == json!({}) {
                pod.as_object_mut().map(|pod| pod.remove("spec"));
            }
            pod
        },
    )
}

fn set() -> impl Strategy<Value = FieldSet> {
    config().prop_map(|config| fields(place(), &config))
}

fn place() -> Place {
    Place::Struct(crate::facts::schema("core.v1.Pod").unwrap())
}

fn pod() -> Managed {
    Managed::new("", "v1", "Pod")
}

/// Does the object say what the configuration says? Lists may hold more.
fn says(object: &Value, config: &Value) -> bool {
    match (object, config) {
        (Value::Object(object), Value::Object(config)) => {
            config.iter().all(|(k, v)| object.get(k).is_some_and(|o| says(o, v)))
        }
        (Value::Array(object), Value::Array(config)) => config.iter().all(|c| object.iter().any(|o| says(o, c))),
        (object, config) => object == config,
    }
}

/// A part of a configuration: every key is kept or not.
fn part_of(config: &Value, keep: &mut impl FnMut() -> bool, depth: u8) -> Value {
    match config {
        Value::Object(map) => Value::Object(
            map.iter()
                .filter_map(|(k, v)| {
                    let must = matches!(k.as_str(), "name" | "containerPort" | "protocol") || depth < 1;
                    (must || keep()).then(|| (k.clone(), part_of(v, keep, depth + 1)))
                })
                .collect::<Map<_, _>>(),
        ),
        Value::Array(list) => {
            let kept: Vec<&Value> = list.iter().filter(|_| keep()).collect();
            Value::Array(kept.into_iter().map(|v| part_of(v, keep, depth + 1)).collect())
        }
        other => other.clone(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn sets_are_sets(a in set(), b in set(), c in set()) {
        let union = |x: &FieldSet, y: &FieldSet| { let mut u = x.clone(); u.add(y.clone()); u };
        let minus = |x: &FieldSet, y: &FieldSet| { let mut m = x.clone(); m.subtract(y); m };
        prop_assert_eq!(union(&a, &b), union(&b, &a));
        prop_assert_eq!(union(&union(&a, &b), &c), union(&a, &union(&b, &c)));
        prop_assert_eq!(union(&a, &a), a.clone());
        prop_assert_eq!(a.intersection(&b), b.intersection(&a));
        prop_assert_eq!(union(&minus(&a, &b), &a.intersection(&b)), a.clone());
        prop_assert!(minus(&a, &b).intersection(&b).is_empty());
        prop_assert_eq!(FieldSet::parse(&a.to_string()).unwrap(), a.clone());
    }

    #[test]
    fn a_text_is_changed_as_its_set_is(a in set(), b in set()) {
        let (mut sum, mut rest) = (a.clone(), a.clone());
        sum.add(b.clone());
        rest.subtract(&b);
        let written = |set: &FieldSet| if set.is_empty() { String::new() } else { set.to_string() };
        prop_assert_eq!(text::with(&a.to_string(), &b), Some(written(&sum)));
        prop_assert_eq!(text::without(&a.to_string(), &b), Some(written(&rest)));
    }

    #[test]
    fn what_a_creator_owns_is_what_differs_from_nothing(a in config()) {
        let cut = FieldSet::of_fields(&["spec.containers", "status"]);
        let mut expected = walk::compare(place(), &json!({}), &a).changed;
        prop_assert_eq!(text::of_new(place(), &a, &FieldSet::default(), &FieldSet::default()), expected.to_string());
        expected.cut(&cut);
        expected.subtract(&NOBODYS);
        prop_assert_eq!(text::of_new(place(), &a, &NOBODYS, &cut), expected.to_string());
    }

    #[test]
    fn nothing_differs_from_itself_and_all_from_nothing(a in config(), b in config()) {
        prop_assert!(walk::compare(place(), &a, &a).is_empty());
        let (there, back) = (walk::compare(place(), &a, &b), walk::compare(place(), &b, &a));
        // What is gained on the way is lost on the way back.
        prop_assert!(walk::compare(place(), &a, &b).removed.intersection(&there.changed).is_empty());
        let mut lost = back.removed.clone();
        lost.subtract(&there.changed);
        prop_assert!(lost.is_empty(), "{lost}");
    }

    #[test]
    fn an_object_says_what_was_applied_last(a in config(), b in config()) {
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        prop_assert!(says(&object.object, &a), "{} {a}", object.object);
        object.apply("b", true, &b).unwrap();
        prop_assert!(says(&object.object, &b), "{} {b}", object.object);
    }

    #[test]
    fn to_apply_again_changes_nothing(a in config(), b in config()) {
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        object.apply("b", true, &b).unwrap();
        let before = object.clone();
        object.apply("b", false, &b).unwrap();
        prop_assert_eq!(&object.object, &before.object);
        prop_assert_eq!(object.managed.write(), before.managed.write());
    }

    #[test]
    fn a_part_applied_takes_the_rest_away(a in config(), seed in prop::collection::vec(any::<bool>(), 64)) {
        let mut choices = seed.into_iter().cycle();
        let part = part_of(&a, &mut || choices.next().unwrap_or(true), 0);
        let (mut object, mut fresh) = (pod(), pod());
        object.apply("a", false, &a).unwrap();
        object.apply("a", false, &part).unwrap();
        fresh.apply("a", false, &part).unwrap();
        prop_assert_eq!(&object.object, &fresh.object, "{} then {}", a, part);
        prop_assert_eq!(object.fields_of("a"), fresh.fields_of("a"));
    }

    #[test]
    fn what_others_own_survives(a in config(), b in config(), less in config()) {
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        object.apply("b", true, &b).unwrap();
        object.apply("a", true, &less).unwrap();
        let conflicts = walk::compare(place(), &b, &less).changed;
        if !fields(place(), &b).intersection(&conflicts).paths().iter().any(|p| !p.is_empty()) {
            prop_assert!(says(&object.object, &b), "{} {b}", object.object);
        }
        prop_assert!(says(&object.object, &less));
    }

    #[test]
    fn managers_of_different_fields_never_conflict(a in config(), b in config()) {
        let (fields_a, fields_b) = (fields(place(), &a), fields(place(), &b));
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        let result = object.apply("b", false, &b);
        if fields_a.intersection(&fields_b).is_empty() {
            prop_assert!(result.is_ok(), "{a} {b} {result:?}");
        }
        if result.is_ok() {
            prop_assert!(says(&object.object, &a) && says(&object.object, &b), "{}", object.object);
        }
    }

    #[test]
    fn force_takes_what_conflicts_and_no_more(a in config(), b in config()) {
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        let conflicts = object.clone().apply("b", false, &b).err().unwrap_or_default();
        let before = FieldSet::parse(&object.fields_of("a")).unwrap();
        object.apply("b", true, &b).unwrap();
        let mut lost = before.paths();
        let kept = FieldSet::parse(&object.fields_of("a")).unwrap().paths();
        lost.retain(|path| !kept.contains(path));
        let mut named: Vec<String> = conflicts.into_iter().map(|c| c.path).collect();
        lost.sort();
        named.sort();
        prop_assert_eq!(lost, named);
    }

    #[test]
    fn every_field_that_an_update_changes_has_one_owner(a in config(), b in config()) {
        let mut object = pod();
        object.apply("a", false, &a).unwrap();
        object.update("b", b.clone());
        let (of_a, of_b) = (FieldSet::parse(&object.fields_of("a")), FieldSet::parse(&object.fields_of("b")));
        prop_assert!(of_a.unwrap().intersection(&of_b.unwrap()).is_empty());
        let mut gone = fields(place(), &a);
        gone.subtract(&walk::with_named_fields(Some(place()), fields(place(), &b)));
        let left = FieldSet::parse(&object.fields_of("a")).unwrap().intersection(&gone);
        prop_assert!(left.is_empty(), "{left}");
    }
}
