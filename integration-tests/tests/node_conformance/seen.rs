//! Environment, command lines, names, users, and what the node says of itself.
use serde_json::json;

use super::*;

impl Node {
    /// Environment, command lines, names, users, and what the node says of itself.
    pub(super) async fn what_pods_see(&self) {
        let env = |list: Value| json!({"env": list});
        let field = |path: &str| json!({"name": "F", "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let amount = |name: &str, of: &str| json!({"name": name, "valueFrom": {"resourceFieldRef": {"resource": of}}});
        let limits =
            json!({"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "1250m", "memory": "64Mi"}});
        let with = |list: Value| json!({"env": list, "resources": limits});
        let node = self.pods_host().await;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let print = "echo \"$F\"";
        let mut cases = vec![
            case(
                "ConfigMap via environment variable",
                "echo $A",
                env(json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "data-1"}}}])),
                json!({}),
                &["value-1"],
            ),
            case(
                "ConfigMap via the environment, with prefixes",
                "",
                json!({"command": ["env"], "envFrom": [{"configMapRef": {"name": "cm"}}, {"prefix": "p-", "configMapRef": {"name": "cm"}}, {"prefix": "1#", "configMapRef": {"name": "cm"}}]}),
                json!({}),
                &["data_2=value-2", "p-data-1=value-1", "1#data-1=value-1"],
            ),
            case(
                "Secrets in env vars and via the environment",
                "",
                json!({"command": ["env"], "env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "data-1"}}}], "envFrom": [{"prefix": "s_", "secretRef": {"name": "secret"}}]}),
                json!({}),
                &["S=value-1", "s_data-1=value-1"],
            ),
            case(
                "Variable Expansion composes env vars",
                "echo $FOOBAR",
                env(
                    json!([{"name": "FOO", "value": "foo"}, {"name": "BAR", "value": "bar"}, {"name": "FOOBAR", "value": "$(FOO);;$(BAR)"}]),
                ),
                json!({}),
                &["foo;;bar"],
            ),
            case(
                "Variable Expansion in command and args",
                "",
                json!({"env": [{"name": "T", "value": "test"}], "command": ["sh", "-c"], "args": ["echo \"args $(T)\"; echo \"$$(T)\""]}),
                json!({}),
                &["args test", ""],
            ),
            case(
                "Containers override args and command",
                "",
                json!({"command": ["/bin/echo"], "args": ["override", "both"]}),
                json!({}),
                &["override both"],
            ),
            case(
                "Containers override the image's default arguments",
                "",
                json!({"command": null, "args": ["echo", "said by args"]}),
                json!({}),
                &["said by args"],
            ),
            case(
                "Downward API pod UID",
                "grep -q \"pods/$F/etc-hosts\" /proc/self/mountinfo && echo mine",
                env(json!([field("metadata.uid")])),
                json!({}),
                &["mine"],
            ),
            case(
                "Downward API pod name",
                "echo $A $B $C",
                env(
                    json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}, {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}]),
                ),
                json!({}),
                &[&format!("default {} see-8", node.0)],
            ),
            case("Downward API host IP", print, env(json!([field("status.hostIP")])), json!({}), &[&node.1]),
            case("Downward API host IPs", print, env(json!([field("status.hostIPs")])), json!({}), &[&node.1]),
            case(
                "Downward API pod IP",
                "test -n \"$F\" && ip addr | grep -q \" $F/\" && echo mine",
                env(json!([field("status.podIP")])),
                json!({}),
                &["mine"],
            ),
            case(
                "Downward API requests and limits",
                "echo $A $B $C $D",
                with(json!([
                    amount("A", "requests.cpu"),
                    amount("B", "limits.cpu"),
                    amount("C", "requests.memory"),
                    amount("D", "limits.memory")
                ])),
                json!({}),
                &["1 2 33554432 67108864"],
            ),
            case(
                "Downward API default limits from node allocatable",
                "echo $A $B",
                env(json!([amount("A", "limits.cpu"), amount("B", "limits.memory")])),
                json!({}),
                &[&format!("{cpus} {}", self.allocatable_memory().await)],
            ),
            case(
                "Pods contain environment variables for services",
                "env",
                json!({}),
                json!({}),
                &["FOOSERVICE_SERVICE_PORT=8765", "FOOSERVICE_PORT_8765_TCP_PROTO=tcp"],
            ),
            case(
                "Kubelet writes hostAliases to /etc/hosts",
                "cat /etc/hosts",
                json!({}),
                json!({"hostAliases": [{"ip": "123.45.67.89", "hostnames": ["foo", "bar"]}]}),
                &["# Kubernetes-managed hosts file.", "123.45.67.89\tfoo\tbar"],
            ),
            case(
                "KubeletManagedEtcHosts in the host's network",
                "head -1 /etc/hosts",
                json!({}),
                json!({"hostNetwork": true}),
                &["# Kubernetes-managed hosts file (host network)."],
            ),
            case(
                "KubeletManagedEtcHosts gives way to a mount",
                "grep -c Kubernetes-managed /etc/hosts || true",
                json!({"volumeMounts": [{"name": "h", "mountPath": "/etc/hosts"}]}),
                json!({"volumes": [{"name": "h", "hostPath": {"path": "/etc/hosts"}}]}),
                &["0"],
            ),
            case(
                "Security Context runAsUser 65534",
                "id -u",
                json!({"securityContext": {"runAsUser": 65534}}),
                json!({}),
                &["65534"],
            ),
            case(
                "Security Context of pod and container",
                "id -u; id -g; id -G",
                json!({"securityContext": {"runAsUser": 1001}}),
                json!({"securityContext": {"runAsUser": 5, "runAsGroup": 2002, "fsGroup": 3003, "supplementalGroups": [4004]}}),
                &["1001", "2002"],
            ),
            case(
                "Security Context of the container",
                "id -u; id -g",
                json!({"securityContext": {"runAsUser": 1001, "runAsGroup": 2002}}),
                json!({}),
                &["1001", "2002"],
            ),
            case(
                "Security Context of the pod",
                "id -u; id -g",
                json!({}),
                json!({"securityContext": {"runAsUser": 1001, "runAsGroup": 2002}}),
                &["1001", "2002"],
            ),
            case(
                "Security Context unprivileged",
                "ip link add dummy0 type dummy || echo refused",
                json!({"securityContext": {"privileged": false}}),
                json!({}),
                &["refused"],
            ),
            case(
                "Security Context readOnlyRootFilesystem",
                "echo x >/file || echo refused",
                json!({"securityContext": {"readOnlyRootFilesystem": true}}),
                json!({}),
                &["refused"],
            ),
            case(
                "Security Context with a root file system to write to",
                "echo x >/file && cat /file",
                json!({"securityContext": {"readOnlyRootFilesystem": false}}),
                json!({}),
                &["x"],
            ),
            case(
                "Security Context AllowPrivilegeEscalation",
                "grep NoNewPrivs /proc/self/status",
                json!({"securityContext": {"allowPrivilegeEscalation": false, "runAsUser": 1000}}),
                json!({}),
                &["NoNewPrivs:\t1"],
            ),
            case(
                "Sysctls",
                "cat /proc/sys/kernel/shm_rmid_forced",
                json!({}),
                json!({"securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]}}),
                &["1"],
            ),
            case("RuntimeClass with overhead", "echo ran", json!({}), json!({"runtimeClassName": "costly"}), &["ran"]),
            case("RuntimeClass without", "echo ran", json!({}), json!({"runtimeClassName": "plain"}), &["ran"]),
        ];
        // An image's own command: the shell, which ends at once without input.
        let mut image = case("Containers use the image's defaults", "", json!({"command": null}), json!({}), &[]);
        image.log.clear();
        cases.push(image);
        self.all("see", cases).await;
    }
}
