//! Pods that are refused, each for one thing, and pods that are not.

use super::{pod, pod_defaults};
use crate::registry::field::{Errors, Field};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn valid() -> Value {
    json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {
        "containers": [{"name": "c", "image": "x:1", "ports": [{"containerPort": 80, "name": "web"}],
            "env": [{"name": "A", "value": "b"}], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [{"name": "v", "emptyDir": {}}]}})
}

fn errors_of(pod: &Value) -> Vec<String> {
    let mut object = pod.clone();
    pod_defaults::pod(&mut object);
    let mut errors = Errors::default();
    (pod::RULES.validate)(&Field::root(&object), &mut errors);
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn each_mistake_is_named_where_it_is() {
    assert!(errors_of(&valid()).is_empty(), "{:?}", errors_of(&valid()));
    let cases: &[(&str, Value, &str)] = &[
        ("/spec/containers", json!([]), "spec.containers: Required value"),
        (
            "/spec/containers/0/name",
            json!("A"),
            "spec.containers[0].name: Invalid value: \"A\": a lowercase RFC 1123 label",
        ),
        ("/spec/containers/0/image", json!(""), "spec.containers[0].image: Required value"),
        (
            "/spec/containers/0/image",
            json!(" x"),
            "spec.containers[0].image: Invalid value: \" x\": must not have leading",
        ),
        (
            "/spec/containers/0/imagePullPolicy",
            json!("Now"),
            "spec.containers[0].imagePullPolicy: Unsupported value: \"Now\": supported values: \"Always\", \"IfNotPresent\", \"Never\"",
        ),
        (
            "/spec/containers/0/ports/0/containerPort",
            json!(70000),
            "spec.containers[0].ports[0].containerPort: Invalid value: 70000: must be between 1 and 65535",
        ),
        (
            "/spec/containers/0/ports/0/name",
            json!("-a-very-long-name"),
            "spec.containers[0].ports[0].name: Invalid value",
        ),
        (
            "/spec/containers/0/ports/0/protocol",
            json!("tcp"),
            "spec.containers[0].ports[0].protocol: Unsupported value: \"tcp\": supported values: \"SCTP\", \"TCP\", \"UDP\"",
        ),
        ("/spec/containers/0/env/0/name", json!(""), "spec.containers[0].env[0].name: Required value"),
        (
            "/spec/containers/0/env/0/valueFrom",
            json!({"fieldRef": {"fieldPath": "spec.x"}}),
            "spec.containers[0].env[0].valueFrom: Invalid value",
        ),
        ("/spec/containers/0/envFrom", json!([{}]), "spec.containers[0].envFrom[0]: Invalid value"),
        (
            "/spec/containers/0/volumeMounts/0/name",
            json!("w"),
            "spec.containers[0].volumeMounts[0].name: Not found: \"w\"",
        ),
        (
            "/spec/containers/0/volumeMounts/0/subPath",
            json!("../x"),
            "spec.containers[0].volumeMounts[0].subPath: Invalid value: \"../x\": must not contain '..'",
        ),
        (
            "/spec/containers/0/resources",
            json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
            "spec.containers[0].resources.requests: Invalid value: \"2\": must be less than or equal to cpu limit of 1",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"bogus": "1"}}),
            "spec.containers[0].resources.limits[bogus]: Invalid value: \"bogus\": must be a standard resource",
        ),
        (
            "/spec/containers/0/resources",
            json!({"requests": {"a.b/c": "1"}}),
            "spec.containers[0].resources.limits: Required value: Limit must be set",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"a.b/c": "500m"}}),
            "spec.containers[0].resources.limits[a.b/c]: Invalid value: \"500m\": must be an integer",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({}),
            "spec.containers[0].livenessProbe: Required value: must specify a handler type",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({"exec": {}}),
            "spec.containers[0].livenessProbe.exec.command: Required value",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({"tcpSocket": {"port": 0}}),
            "spec.containers[0].livenessProbe.tcpSocket.port: Invalid value: 0: must be between",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({"exec": {"command": ["a"]}, "successThreshold": 2}),
            "spec.containers[0].livenessProbe.successThreshold: Invalid value: 2: must be 1",
        ),
        (
            "/spec/containers/0/lifecycle",
            json!({"preStop": {}}),
            "spec.containers[0].lifecycle.preStop: Required value: must specify a handler type",
        ),
        (
            "/spec/containers/0/securityContext",
            json!({"runAsUser": -1}),
            "spec.containers[0].securityContext.runAsUser: Invalid value: -1: must be between 0 and",
        ),
        (
            "/spec/containers/0/securityContext",
            json!({"privileged": true, "allowPrivilegeEscalation": false}),
            "spec.containers[0].securityContext.allowPrivilegeEscalation: Invalid value: false: cannot set",
        ),
        (
            "/spec/initContainers",
            json!([{"name": "c", "image": "x"}]),
            "spec.initContainers[0].name: Duplicate value: \"c\"",
        ),
        (
            "/spec/initContainers",
            json!([{"name": "i", "image": "x", "readinessProbe": {"exec": {"command": ["a"]}}}]),
            "spec.initContainers[0].readinessProbe: Forbidden: may not be set for init containers",
        ),
        ("/spec/volumes/0/name", json!("V"), "spec.volumes[0].name: Invalid value: \"V\""),
        (
            "/spec/volumes/0/hostPath",
            json!({"path": "/a"}),
            "spec.volumes[0].hostPath: Forbidden: may not specify more than 1 volume type",
        ),
        ("/spec/volumes/0", json!({"name": "v", "secret": {}}), "spec.volumes[0].secret.secretName: Required value"),
        (
            "/spec/volumes/0",
            json!({"name": "v", "hostPath": {"path": "/a", "type": "X"}}),
            "spec.volumes[0].hostPath.type: Unsupported value: \"X\"",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "configMap": {"name": "a", "defaultMode": 4096}}),
            "spec.volumes[0].configMap.defaultMode: Invalid value: 4096: must be a number between 0 and 0777",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "projected": {"sources": [{"serviceAccountToken": {"expirationSeconds": 1, "path": "t"}}]}}),
            "spec.volumes[0].projected.sources[0].serviceAccountToken.expirationSeconds: Invalid value: 1: may not specify a duration less than 10 minutes",
        ),
        (
            "/spec/restartPolicy",
            json!("Maybe"),
            "spec.restartPolicy: Unsupported value: \"Maybe\": supported values: \"Always\", \"OnFailure\", \"Never\"",
        ),
        (
            "/spec/dnsPolicy",
            json!("None"),
            "spec.dnsConfig.nameservers: Required value: must provide at least one DNS nameserver",
        ),
        (
            "/spec/activeDeadlineSeconds",
            json!(0),
            "spec.activeDeadlineSeconds: Invalid value: 0: must be between 1 and 2147483647, inclusive",
        ),
        ("/spec/hostname", json!("a.b"), "spec.hostname: Invalid value: \"a.b\": must not contain dots"),
        ("/spec/nodeSelector", json!({"a b": "c"}), "spec.nodeSelector: Invalid value: \"a b\""),
        (
            "/spec/tolerations",
            json!([{"operator": "Equal"}]),
            "spec.tolerations[0].operator: Invalid value: \"Equal\": operator must be Exists when `key` is empty",
        ),
        (
            "/spec/affinity",
            json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}),
            "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms: Required value",
        ),
        (
            "/spec/affinity",
            json!({"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 0, "podAffinityTerm": {"topologyKey": "a"}}]}}),
            "spec.affinity.podAffinity.preferredDuringSchedulingIgnoredDuringExecution[0].weight: Invalid value: 0: must be in the range 1-100",
        ),
        (
            "/spec/topologySpreadConstraints",
            json!([{"maxSkew": 0, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]),
            "spec.topologySpreadConstraints[0].maxSkew: Invalid value: 0: must be greater than zero",
        ),
        (
            "/spec/securityContext",
            json!({"seccompProfile": {"type": "Localhost"}}),
            "spec.securityContext.seccompProfile.localhostProfile: Required value: must be set when seccomp type is Localhost",
        ),
        (
            "/spec/securityContext",
            json!({"sysctls": [{"name": "A", "value": "1"}]}),
            "spec.securityContext.sysctls[0].name: Invalid value: \"A\"",
        ),
        (
            "/spec/hostAliases",
            json!([{"ip": "x"}]),
            "spec.hostAliases[0].ip: Invalid value: \"x\": must be a valid IP address",
        ),
        ("/spec/schedulingGates", json!([{"name": "a"}, {"name": "a"}]), "spec.schedulingGates[1]: Duplicate value"),
    ];
    for (pointer, value, start) in cases {
        let mut object = valid();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        match object.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[field.parse::<usize>().unwrap()] = value.clone(),
            Value::Object(map) => _ = map.insert(field.to_owned(), value.clone()),
            _ => unreachable!(),
        }
        let errors = errors_of(&object);
        assert!(errors.iter().any(|e| e.starts_with(start)), "{pointer} {value}: {errors:?}");
    }
}

fn manifests(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            manifests(&path, found);
        } else if path.extension().is_some_and(|e| e == "yaml") {
            found.push(path);
        }
    }
}

#[test]
fn what_pod_security_judges_is_valid() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/pod-security");
    let mut found = Vec::new();
    manifests(&root, &mut found);
    if found.is_empty() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", root.display());
        println!("skipped: {} is missing", root.display());
        return;
    }
    let schema = apimachinery::facts::schema("core.v1.Pod").unwrap();
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        for document in apimachinery::yaml::documents(&text).unwrap() {
            let mode = apimachinery::decode::FieldValidation::Strict;
            let decoded = apimachinery::decode::decode_value(document, schema, mode)
                .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let errors = errors_of(&decoded.value);
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        }
    }
}
