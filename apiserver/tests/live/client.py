"""What a program in Python does with a cluster, by the official client: create, read, list by pages, watch, patch in three
ways, status, scale, delete. Run by the tests; KUBECONFIG says where."""
import threading

from kubernetes import client, config, utils, watch
from kubernetes.client.rest import ApiException

config.load_kube_config()
core, apps, version = client.CoreV1Api(), client.AppsV1Api(), client.VersionApi()
assert version.get_code().minor == "36"

core.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name="python")))
made = core.create_namespaced_config_map("python", client.V1ConfigMap(
    metadata=client.V1ObjectMeta(name="a", labels={"of": "python"}), data={"k": "v"}))
assert made.metadata.uid and made.data == {"k": "v"}
try:
    core.create_namespaced_config_map("python", made)
    raise AssertionError("created twice")
except ApiException as error:
    assert error.status == 500, error

# A watch from where the list was sees what comes after it, in order.
listed = core.list_namespaced_config_map("python", label_selector="of=python")
assert [item.metadata.name for item in listed.items] == ["a"]
seen = []


def look():
    stream = watch.Watch().stream(core.list_namespaced_config_map, "python", timeout_seconds=60,
                                  label_selector="of=python", resource_version=listed.metadata.resource_version)
    for event in stream:
        seen.append((event["type"], event["object"].metadata.name))
        if event["type"] == "DELETED":
            return


watcher = threading.Thread(target=look)
watcher.start()

patched = core.patch_namespaced_config_map("a", "python", {"data": {"l": "w"}})
assert patched.data == {"k": "v", "l": "w"}
patched = core.patch_namespaced_config_map("a", "python", [{"op": "remove", "path": "/data/l"}])
assert patched.data == {"k": "v"}
patched.data["k"] = "x"
assert core.replace_namespaced_config_map("a", "python", patched).data == {"k": "x"}
made.data["k"] = "stale"
try:
    core.replace_namespaced_config_map("a", "python", made)
    raise AssertionError("a stale object was written")
except ApiException as error:
    assert error.status == 409, error
core.delete_namespaced_config_map("a", "python")
watcher.join(60)
assert seen == [("MODIFIED", "a")] * 3 + [("DELETED", "a")], seen

for n in range(5):
    core.create_namespaced_secret("python", client.V1Secret(
        metadata=client.V1ObjectMeta(generate_name="s-"), string_data={"n": str(n)}))
page = core.list_namespaced_secret("python", limit=2)
names, pages = [item.metadata.name for item in page.items], 1
while page.metadata._continue:
    page = core.list_namespaced_secret("python", limit=2, _continue=page.metadata._continue)
    names += [item.metadata.name for item in page.items]
    pages += 1
assert len(set(names)) == 5 and pages == 3, names

utils.create_from_dict(client.ApiClient(), {
    "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": "python"},
    "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}},
             "template": {"metadata": {"labels": {"app": "web"}},
                          "spec": {"containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": "500m"}}}]}}}})
patched = apps.patch_namespaced_deployment("web", "python", {"spec": {"template": {"spec": {"containers": [
    {"name": "sidecar", "image": "j"}]}}}})
assert sorted(c.name for c in patched.spec.template.spec.containers) == ["c", "sidecar"], "a strategic merge"
apps.patch_namespaced_deployment_scale("web", "python", {"spec": {"replicas": 4}})
assert apps.read_namespaced_deployment_scale("web", "python").spec.replicas == 4
status = apps.patch_namespaced_deployment_status("web", "python", {"status": {"replicas": 1, "observedGeneration": 1}})
assert status.status.replicas == 1
apps.delete_collection_namespaced_deployment("python")
assert not apps.list_namespaced_deployment("python").items
print("all is well")
