"""Streams by the official client for Python: a command's output, its input, its exit code, and a forwarded port. Run by the
tests; KUBECONFIG says where, the pod is `who`, which says `pong` on port 7000."""
import time

from kubernetes import client, config
from kubernetes.stream import portforward, stream

config.load_kube_config()
core = client.CoreV1Api()


def run(*command, **options):
    options = {"stdout": True, "stderr": True, "stdin": False, "tty": False, **options}
    return stream(core.connect_get_namespaced_pod_exec, "who", "default", container="a", command=list(command), **options)


assert run("echo", "said") == "said\n"
assert len(run("head", "-c", "1000000", "/dev/zero")) == 1000000

session = run("sh", "-c", "read line; echo got $line; echo wrong >&2; exit 7", stdin=True, _preload_content=False)
session.write_stdin("fed\n")
session.run_forever(timeout=60)
assert session.read_stdout() == "got fed\n" and session.read_stderr() == "wrong\n"
assert session.returncode == 7, session.returncode

for attempt in range(60):
    forwarded = portforward(core.connect_get_namespaced_pod_portforward, "who", "default", ports="7000")
    socket = forwarded.socket(7000)
    socket.settimeout(10)
    heard = socket.recv(100)
    socket.close()
    if heard:
        break
    # Nobody listens yet.
    time.sleep(1)
assert heard == b"pong\n", (heard, forwarded.error(7000))
print("all is well")
