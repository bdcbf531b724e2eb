//! Pods that are refused, each for one thing, and pods that are not.

use super::{pod, pod_defaults, pod_update};
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
    for check in [Some(pod::RULES.validate), pod::RULES.validate_metadata].into_iter().flatten() {
        check(&Field::root(&object), &mut errors);
    }
    errors.0.iter().map(ToString::to_string).collect()
}

fn put(object: &mut Value, pointer: &str, value: Value) {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap() {
        Value::Array(list) => list[field.parse::<usize>().unwrap()] = value,
        Value::Object(map) => _ = map.insert(field.to_owned(), value),
        _ => unreachable!(),
    }
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
        (
            "/spec/containers/0/envFrom",
            json!([{}]),
            "spec.containers[0].envFrom: Invalid value: \"\": must specify one of: `configMapRef` or `secretRef`",
        ),
        (
            "/spec/containers/0/volumeMounts/0/name",
            json!("w"),
            "spec.containers[0].volumeMounts[0].name: Not found: \"w\"",
        ),
        (
            "/spec/containers/0/volumeMounts/0/subPath",
            json!("../x"),
            "spec.containers[0].volumeMounts.subPath: Invalid value: \"../x\": must not contain '..'",
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
            "spec.containers[0].securityContext: Invalid value: {",
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
            "spec.dnsConfig: Required value: must provide `dnsConfig` when `dnsPolicy` is None",
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
        (
            "/spec/schedulingGates",
            json!([{"name": "a"}, {"name": "a"}]),
            "spec.schedulingGates[1]: Duplicate value: \"a\"",
        ),
        // containers
        (
            "/spec/containers/0/restartPolicyRules",
            json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [1]}}]),
            "spec.containers[0].restartPolicy: Required value: must specify restartPolicy when restart rules are used",
        ),
        (
            "/spec/containers/0/restartPolicyRules",
            json!([{"action": "x"}]),
            "spec.containers[0].restartPolicyRules[0].exitCodes: Required value: must be specified",
        ),
        (
            "/spec/containers/0/resizePolicy",
            json!([{"resourceName": "disk", "restartPolicy": "NotRequired"}]),
            "spec.containers[0].resizePolicy: Unsupported value: \"disk\": supported values: \"cpu\", \"memory\"",
        ),
        (
            "/spec/containers/0/ports",
            json!([{"containerPort": 80, "hostPort": 80}, {"containerPort": 81, "hostPort": 80}]),
            "spec.containers[0].ports[1].hostPort: Duplicate value: \"TCP//80\"",
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/a"}]),
            "spec.containers[0].volumeMounts[1].mountPath: Invalid value: \"/a\": must be unique",
        ),
        (
            "/spec/containers/0/volumeMounts",
            json!([{"name": "v", "mountPath": "/a", "recursiveReadOnly": "Enabled"}]),
            "spec.containers[0].volumeMounts.recursiveReadOnly: Forbidden: may only be specified when readOnly is true",
        ),
        (
            "/spec/containers/0/volumeDevices",
            json!([{"name": "v", "devicePath": "/dev/a"}]),
            "spec.containers[0].volumeDevices[0].name: Invalid value: \"v\": can only use volume source type of PersistentVolumeClaim",
        ),
        (
            "/spec/containers/0/lifecycle",
            json!({"preStop": {"sleep": {"seconds": 31}}}),
            "spec.containers[0].lifecycle.preStop.sleep: Invalid value: 31: must be non-negative and less than terminationGracePeriodSeconds (30)",
        ),
        (
            "/spec/containers/0/livenessProbe",
            json!({"httpGet": {"port": 80, "httpHeaders": [{"name": "a b"}]}}),
            "spec.containers[0].livenessProbe.httpGet.httpHeaders: Invalid value: \"a b\": a valid HTTP header",
        ),
        (
            "/spec/containers/0/readinessProbe",
            json!({"exec": {"command": ["a"]}, "tcpSocket": {"port": 1}}),
            "spec.containers[0].readinessProbe.tcpSocket: Forbidden: may not specify more than 1 handler type",
        ),
        (
            "/spec/containers/0/readinessProbe",
            json!({"exec": {"command": ["a"]}, "terminationGracePeriodSeconds": 5}),
            "spec.containers[0].readinessProbe.terminationGracePeriodSeconds: Invalid value: 5: must not be set for readinessProbes",
        ),
        // environment
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}),
            "spec.containers[0].env[0].valueFrom: Invalid value: \"\": may not be specified when `value` is not empty",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Invalid value: \"spec.x\": error converting fieldPath: field label not supported: spec.x",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "status.phase"}}}),
            "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath: Unsupported value: \"status.phase\": supported values: \"metadata.name\",",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "2"}}}),
            "spec.containers[0].env[0].valueFrom.resourceFieldRef.divisor: Invalid value: \"limits.cpu\": only divisor's values 1m and 1 are supported with the cpu resource",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "a/b"}}}),
            "spec.containers[0].env[0].valueFrom.secretKeyRef.key: Invalid value: \"a/b\": a valid config key",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "A", "valueFrom": {"fileKeyRef": {"volumeName": "w", "path": "p", "key": "k"}}}),
            "spec.containers[0].env[0].valueFrom.fileKeyRef.volumeName: Not found: \"w\"",
        ),
        (
            "/spec/containers/0/env/0",
            json!({"name": "a=b"}),
            "spec.containers[0].env[0].name: Invalid value: \"a=b\": a valid environment variable name",
        ),
        // resources
        (
            "/spec/containers/0/resources",
            json!({"limits": {"hugepages-2Mi": "3Mi", "cpu": "1"}}),
            "spec.containers[0].resources.limits[hugepages-2Mi]: Invalid value: \"3Mi\": 3Mi is not positive integer multiple of hugepages-2Mi",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"hugepages-2Mi": "2Mi"}}),
            "spec.containers[0].resources: Forbidden: HugePages require cpu or memory",
        ),
        (
            "/spec/containers/0/resources",
            json!({"claims": [{"name": "x"}]}),
            "spec.containers[0].resources.claims[0]: Not found: \"x\": must be one of the names in pod.spec.resourceClaims which is empty",
        ),
        (
            "/spec/resources",
            json!({"limits": {"ephemeral-storage": "1"}}),
            "spec.resources.limits[ephemeral-storage]: Unsupported value: \"ephemeral-storage\": supported values: \"cpu\", \"hugepages-\", \"memory\"",
        ),
        (
            "/spec/overhead",
            json!({"bogus": "1"}),
            "spec.overhead.limits[bogus]: Invalid value: \"bogus\": must be a standard resource type",
        ),
        (
            "/spec/resourceClaims",
            json!([{"name": "a"}]),
            "spec.resourceClaims[0]: Invalid value: {\"name\":\"a\"}: must specify one of: `resourceClaimName`, `resourceClaimTemplateName`",
        ),
        // volumes
        (
            "/spec/volumes/0",
            json!({"name": "v", "gcePersistentDisk": {}}),
            "spec.volumes[0].persistentDisk.pdName: Required value",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "nfs": {"server": "s", "path": "p"}}),
            "spec.volumes[0].nfs.path: Invalid value: \"p\": must be an absolute path",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "iscsi": {"targetPortal": "p", "iqn": "iqn.x", "lun": 300}}),
            "spec.volumes[0].iscsi.iqn: Invalid value: \"iqn.x\": must be valid format",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "downwardAPI": {"items": [{"path": "a"}]}}),
            "spec.volumes[0].downwardAPI: Required value: one of fieldRef and resourceFieldRef is required",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "configMap": {"name": "c", "items": [{"key": "k", "path": "..a"}]}}),
            "spec.volumes[0].configMap.items[0].path: Invalid value: \"..a\": must not start with '..'",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "projected": {"sources": [
                {"secret": {"name": "s", "items": [{"key": "k", "path": "p"}]}},
                {"configMap": {"name": "c", "items": [{"key": "k", "path": "p"}]}}]}}),
            "spec.volumes[0].projected: Invalid value: \"c\": conflicting duplicate paths",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "ephemeral": {}}),
            "spec.volumes[0].ephemeral.volumeClaimTemplate: Required value",
        ),
        ("/spec/volumes/0", json!({"name": "v", "image": {}}), "spec.volumes[0].image.reference: Required value"),
        (
            "/spec/volumes/0",
            json!({"name": "v", "csi": {"driver": "A_b"}}),
            "spec.volumes[0].csi.driver: Invalid value: \"A_b\"",
        ),
        // the pod as a whole
        (
            "/metadata/annotations",
            json!({"controller.kubernetes.io/pod-deletion-cost": "+1"}),
            "metadata.annotations[controller.kubernetes.io/pod-deletion-cost]: Invalid value: \"+1\": must be a 32bit integer",
        ),
        (
            "/metadata/annotations",
            json!({"kubernetes.io/config.mirror": "x"}),
            "metadata.annotations[kubernetes.io/config.mirror]: Invalid value: \"x\": must set spec.nodeName",
        ),
        (
            "/metadata/annotations",
            json!({"container.apparmor.security.beta.kubernetes.io/z": "unconfined"}),
            "metadata.annotations[container.apparmor.security.beta.kubernetes.io/z]: Invalid value: \"z\": container not found",
        ),
        (
            "/spec/dnsConfig",
            json!({"searches": ["a b"]}),
            "spec.dnsConfig.searches[0]: Invalid value: \"a b\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_'",
        ),
        (
            "/spec/dnsConfig",
            json!({"nameservers": ["10.0.0.01"]}),
            "spec.dnsConfig.nameservers[0]: Invalid value: \"10.0.0.01\": must not have leading 0s",
        ),
        (
            "/spec/os",
            json!({"name": "beos"}),
            "spec.os: Unsupported value: \"beos\": supported values: \"linux\", \"windows\"",
        ),
        (
            "/spec/preemptionPolicy",
            json!("x"),
            "spec.preemptionPolicy: Unsupported value: \"x\": supported values: \"PreemptLowerPriority\", \"Never\"",
        ),
        (
            "/spec/hostnameOverride",
            json!("A"),
            "spec.hostnameOverride: Invalid value: \"A\": a lowercase RFC 1123 subdomain",
        ),
        (
            "/spec/tolerations",
            json!([{"key": "a", "operator": "Gt", "value": "1"}]),
            "spec.tolerations[0].operator: Unsupported value: \"Gt\": supported values: \"Equal\", \"Exists\"",
        ),
        (
            "/spec/tolerations",
            json!([{"key": "a", "operator": "Exists", "tolerationSeconds": 1}]),
            "spec.tolerations[0].effect: Invalid value: \"\": effect must be 'NoExecute' when `tolerationSeconds` is set",
        ),
        (
            "/spec/topologySpreadConstraints",
            json!([{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway", "minDomains": 1}]),
            "spec.topologySpreadConstraints[0].minDomains: Invalid value: 1: can only use minDomains if whenUnsatisfiable=DoNotSchedule, not ScheduleAnyway",
        ),
        (
            "/spec/topologySpreadConstraints",
            json!([{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "ScheduleAnyway", "matchLabelKeys": ["k"]}]),
            "spec.topologySpreadConstraints[0].matchLabelKeys: Forbidden: must not be specified when labelSelector is not set",
        ),
        (
            "/spec/affinity",
            json!({"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "a", "labelSelector": {"matchLabels": {"k": "v"},
                "matchExpressions": [{"key": "k", "operator": "In", "values": ["v"]}]}, "matchLabelKeys": ["k"]}]}}),
            "spec.affinity.podAffinity.requiredDuringSchedulingIgnoredDuringExecution[0][0]: Invalid value: \"k\": exists in both matchLabelKeys and labelSelector",
        ),
        (
            "/spec/affinity",
            json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [{"key": "spec.x", "operator": "In", "values": ["a"]}]}]}}}),
            "spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchFields[0].key: Invalid value: \"spec.x\": not a valid field selector key",
        ),
        (
            "/spec/securityContext",
            json!({"appArmorProfile": {"type": "Localhost"}}),
            "spec.securityContext.appArmorProfile.localhostProfile: Required value: must be set when AppArmor type is Localhost",
        ),
        (
            "/spec/securityContext",
            json!({"windowsOptions": {"runAsUserName": "a/b"}}),
            "spec.securityContext.windowsOptions.runAsUserName: Invalid value: \"a/b\": runAsUserName's User cannot contain the following characters",
        ),
    ];
    for (pointer, value, start) in cases {
        let mut object = valid();
        put(&mut object, pointer, value.clone());
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
            let mut errors = errors_of(&decoded.value);
            // What nobody may do without a user namespace is refused before Pod Security is asked.
            errors.retain(|error| !error.contains("`hostUsers` must be false to use `Unmasked`"));
            assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        }
    }
}

// === changes ===

fn update_errors(change: impl FnOnce(&mut Value), gated: bool) -> Vec<String> {
    let mut old = valid();
    if gated {
        old["spec"]["schedulingGates"] = json!([{"name": "wait"}]);
        old["spec"]["nodeSelector"] = json!({"a": "b"});
    }
    old["spec"]["tolerations"] = json!([{"key": "k", "operator": "Exists"}]);
    pod_defaults::pod(&mut old);
    let mut new = old.clone();
    change(&mut new);
    let mut errors = Errors::default();
    (pod::RULES.validate_update)(&Field::root(&new), &Field::root(&old), &mut errors);
    errors.0.iter().map(ToString::to_string).collect()
}

#[test]
fn little_of_a_pod_may_change() {
    let fine: [fn(&mut Value); 4] = [
        |p| p["spec"]["containers"][0]["image"] = json!("x:2"),
        |p| p["spec"]["activeDeadlineSeconds"] = json!(5),
        |p| p["spec"]["tolerations"] = json!([{"key": "k", "operator": "Exists"}, {"key": "l"}]),
        |p| p["metadata"]["labels"] = json!({"a": "b"}),
    ];
    for change in fine {
        assert_eq!(update_errors(change, false), Vec::<String>::new());
    }
    let refused: [(fn(&mut Value), &str); 8] = [
        (
            |p| p["spec"]["nodeName"] = json!("n"),
            "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)\n",
        ),
        (
            |p| p["spec"]["containers"][0]["command"] = json!(["a"]),
            "spec: Forbidden: pod updates may not change fields",
        ),
        (
            |p| p["spec"]["tolerations"] = json!([]),
            "spec.tolerations: Forbidden: existing toleration can not be modified except its tolerationSeconds",
        ),
        (
            |p| p["spec"]["containers"] = json!([]),
            "spec.containers: Forbidden: pod updates may not add or remove containers",
        ),
        (
            |p| p["spec"]["schedulingGates"] = json!([{"name": "g"}]),
            "spec.schedulingGates[0].name: Forbidden: only deletion is allowed, but found new scheduling gate 'g'",
        ),
        (|p| p["spec"]["nodeSelector"] = json!({"a": "b"}), "spec: Forbidden: pod updates may not change fields"),
        (
            |p| p["spec"]["ephemeralContainers"] = json!([{"name": "e"}]),
            "spec: Forbidden: pod updates may not change fields",
        ),
        (
            |p| p["metadata"]["annotations"] = json!({"kubernetes.io/config.mirror": "x"}),
            "metadata.annotations[kubernetes.io/config.mirror]: Forbidden: may not add mirror pod annotation",
        ),
    ];
    for (change, error) in refused {
        let errors = update_errors(change, false);
        assert!(errors.iter().any(|e| e.starts_with(error)), "{error}: {errors:?}");
    }
}

#[test]
fn a_gated_pod_may_be_narrowed() {
    assert!(update_errors(|p| p["spec"]["nodeSelector"]["c"] = json!("d"), true).is_empty());
    assert!(update_errors(|p| p["spec"]["schedulingGates"] = json!([]), true).is_empty());
    let required =
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{}]}}});
    assert!(update_errors(|p| p["spec"]["affinity"] = required, true).is_empty());
    assert_eq!(
        update_errors(|p| p["spec"]["nodeSelector"] = json!({"a": "c"}), true),
        [
            "spec.nodeSelector: Invalid value: {\"a\":\"c\"}: only additions to spec.nodeSelector are allowed (no mutations or deletions)"
        ]
    );
    let errors = update_errors(|p| p["spec"]["affinity"] = json!({"podAffinity": {"x": 1}}), true);
    assert!(errors[0].starts_with("spec: Forbidden: pod updates may not change fields"), "{errors:?}");
}

#[test]
fn a_resize_changes_cpu_and_memory_and_no_more() {
    let mut old = valid();
    old["spec"]["containers"][0]["resources"] =
        json!({"requests": {"cpu": "1"}, "limits": {"cpu": "2", "memory": "1Gi"}});
    old["spec"]["initContainers"] =
        json!([{"name": "i", "image": "x", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]);
    pod_defaults::pod(&mut old);
    let found = |change: fn(&mut Value)| {
        let mut new = old.clone();
        change(&mut new["spec"]);
        pod_update::prepare_resize(&mut new, &old);
        let mut errors = Errors::default();
        pod_update::validate_resize(&Field::root(&new), &Field::root(&old), &mut errors);
        errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(found(|s| s["containers"][0]["resources"]["requests"]["cpu"] = json!("1500m")), Vec::<String>::new());
    assert_eq!(found(|s| s["containers"][0]["image"] = json!("y")), Vec::<String>::new(), "the rest is not looked at");
    for (change, error) in [
        (
            (|s| s["containers"][0]["resources"]["limits"] = json!({"cpu": "2"})) as fn(&mut Value),
            "spec.containers[0].resources.limits: Forbidden: resource limits cannot be removed",
        ),
        (
            |s| s["containers"][0]["resources"]["limits"]["ephemeral-storage"] = json!("1Gi"),
            "spec: Forbidden: only cpu and memory resources are mutable",
        ),
        (
            |s| s["containers"][0]["resources"]["requests"] = json!({"cpu": "2", "memory": "1Gi"}),
            "spec: Invalid value: \"\": Pod QOS Class may not change as a result of resizing",
        ),
        (
            |s| s["initContainers"][0]["resources"]["requests"]["cpu"] = json!("500m"),
            "spec: Forbidden: resources for non-sidecar init containers are immutable",
        ),
        (|s| s["containers"] = json!([]), "spec: Forbidden: containers may not be added or removed on resize"),
    ] {
        let errors = found(change);
        assert!(errors.iter().any(|e| e == error), "{error}: {errors:?}");
    }
}

#[test]
fn a_status_tells_what_can_have_happened() {
    let old = json!({"spec": {"restartPolicy": "Never", "nodeName": "n", "containers": [{"name": "c"}]}, "status": {"qosClass": "Burstable", "hostIP": "10.0.0.1",
        "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 0}}}]}});
    let found = |change: fn(&mut Value)| {
        let mut new = old.clone();
        change(&mut new["status"]);
        let mut errors = Errors::default();
        (pod::RULES.validate_status)(&Field::root(&new), &Field::root(&old), &mut errors);
        errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(found(|_| {}), Vec::<String>::new());
    for (change, error) in [
        (
            (|s| s["qosClass"] = json!("BestEffort")) as fn(&mut Value),
            "status.qosClass: Invalid value: \"BestEffort\": field is immutable",
        ),
        (
            |s| s["containerStatuses"][0]["state"] = json!({"running": {}}),
            "status.containerStatuses[0].state: Forbidden: may not be transitioned to non-terminated state",
        ),
        (
            |s| s["nominatedNodeName"] = json!("m"),
            "status.nominatedNodeName: Forbidden: may not be set on pods that are already bound to a node",
        ),
        (
            |s| s["podIPs"] = json!([{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]),
            "status.podIPs: Invalid value: [{\"ip\":\"10.0.0.1\"},{\"ip\":\"10.0.0.2\"}]: may specify no more than one IP for each IP family",
        ),
        (
            |s| s["hostIPs"] = json!([{"ip": "10.0.0.2"}]),
            "status.hostIPs[0].ip: Invalid value: \"10.0.0.2\": must be equal to `hostIP`",
        ),
        (
            |s| s["resourceClaimStatuses"] = json!([{"name": "x"}]),
            "status.resourceClaimStatuses[0].name: Invalid value: \"x\": must match the name of an entry in `spec.resourceClaims`",
        ),
        (
            |s| s["extendedResourceClaimStatus"] = json!({"resourceClaimName": "A", "requestMappings": [{"containerName": "c", "resourceName": "x/y", "requestName": "A"}]}),
            "status.extendedResourceClaimStatus.requestMappings[0].resourceName: Invalid value: \"x/y\": must match the extended resource name of an entry in spec.initContainers.resources.requests or spec.containers.resources.requests",
        ),
        (
            |s| s["extendedResourceClaimStatus"] = json!({"requestMappings": [{"containerName": "z"}]}),
            "status.extendedResourceClaimStatus.requestMappings[0].containerName: Invalid value: \"z\": must match the name of an entry in spec.initContainers.name or spec.containers.name",
        ),
        (
            |s| s["extendedResourceClaimStatus"] = json!({}),
            "status.extendedResourceClaimStatus.requestMappings: Required value: at least one request mapping is required",
        ),
        (
            |s| s["extendedResourceClaimStatus"] = json!({}),
            "status.extendedResourceClaimStatus.resourceClaimName: Required value",
        ),
        (
            |s| s["observedGeneration"] = json!(-1),
            "status.observedGeneration: Invalid value: -1: must be a non-negative integer",
        ),
    ] {
        let errors = found(change);
        assert!(errors.iter().any(|e| e == error), "{error}: {errors:?}");
    }
}

#[test]
fn what_is_surely_not_meant_is_warned_of() {
    let cases: [(&str, Value, &str); 9] = [
        (
            "/spec/nodeSelector",
            json!({"beta.kubernetes.io/os": "linux"}),
            "spec.nodeSelector[beta.kubernetes.io/os]: deprecated since v1.14",
        ),
        ("/metadata/name", json!("a.b"), "metadata.name: this is used in the Pod's hostname"),
        (
            "/spec/containers/0/env",
            json!([{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]),
            "spec.containers[0].env[1]: hides previous definition of \"A\", which may be dropped when using apply",
        ),
        (
            "/spec/containers/0/resources",
            json!({"limits": {"memory": "500m"}}),
            "spec.containers[0].resources.limits[memory]: fractional byte value \"500m\" is invalid, must be an integer",
        ),
        (
            "/spec/imagePullSecrets",
            json!([{"name": "a"}, {"name": "a"}]),
            "spec.imagePullSecrets[1].name: duplicate name \"a\"",
        ),
        (
            "/spec/terminationGracePeriodSeconds",
            json!(-1),
            "spec.terminationGracePeriodSeconds: must be >= 0; negative values are invalid",
        ),
        (
            "/spec/containers/0/ports",
            json!([{"containerPort": 80}, {"containerPort": 80}]),
            "spec.containers[0].ports[1]: duplicate port definition with spec.containers[0].ports[0]",
        ),
        (
            "/spec/volumes/0",
            json!({"name": "v", "gitRepo": {"repository": "r"}}),
            "spec.volumes[0].gitRepo: deprecated in v1.11",
        ),
        (
            "/spec/topologySpreadConstraints",
            json!([{"maxSkew": 1, "topologyKey": "a", "whenUnsatisfiable": "DoNotSchedule"}]),
            "spec.topologySpreadConstraints[0].labelSelector: a null labelSelector results in matching no pod",
        ),
    ];
    assert_eq!((pod::RULES.warnings)(&valid(), None), Vec::<String>::new());
    for (pointer, value, start) in cases {
        let mut object = valid();
        put(&mut object, pointer, value);
        pod_defaults::pod(&mut object);
        let warnings = (pod::RULES.warnings)(&object, None);
        assert!(warnings.iter().any(|w| w.starts_with(start)), "{start}: {warnings:?}");
        assert!((pod::RULES.warnings)(&object, Some(&object)).is_empty(), "updates are not warned of");
    }
}
