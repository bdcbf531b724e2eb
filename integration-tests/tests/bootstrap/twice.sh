#!/usr/bin/env bash
# On a throwaway machine: quickstart, quickstart again, reset, and all of it once more. After each reset the machine must
# look as before.
#   twice.sh BOOTSTRAP BINARIES CGROUP
set -euo pipefail
bootstrap=$1 binaries=$2 cgroup=$3

# What a machine is made of, as far as set-up touches it.
picture() {
    find /etc /usr/local /root /run /var/lib /var/log -xdev \
        \( -path /run/netns -o -path /run/lock -o -path /var/log/journal \) -prune -o -print 2>/dev/null |
        grep -v -e '^/root/\.cargo' -e '^/run/xtables.lock' -e '^/run/mount' -e '^/root/\.kube/cache' | sort
    ip -o link | cut -d: -f2 | cut -d@ -f1 | sort
    ip route show | sort
    nft list ruleset
    awk '{print $2}' /proc/self/mounts | grep -v -e '^/sys/' -e '^/proc' -e '^/dev' | sort
    cat /proc/sys/net/ipv4/ip_forward
}

rmdir /var/lib/pilothouse /var/log/pilothouse 2>/dev/null || true
before=$(picture)
for round in 1 2; do
    echo "=== round $round: quickstart"
    "$bootstrap" quickstart --binaries "$binaries" --cgroup-root="$cgroup" </dev/null
    echo "=== round $round: status"
    "$bootstrap" status
    echo "=== round $round: the page through the node port"
    ctl=/usr/local/bin/ctl
    export HOME=/run/lock KUBECONFIG=/etc/kubernetes/admin.conf
    port=$($ctl get service httpd-app -o 'jsonpath={.spec.ports[0].nodePort}')
    $ctl bootstrap fetch "http://10.200.28.11:$port/"
    ready=$($ctl get deployment httpd-app -o 'jsonpath={.status.readyReplicas}')
    [ "$ready" = 2 ] || { echo "httpd-app has $ready ready replicas, not 2"; exit 1; }
    if [ "$round" = 1 ]; then
        echo "=== round $round: quickstart again"
        pids=$(cat /run/pilothouse/*.pid | sort)
        "$bootstrap" quickstart --binaries "$binaries" </dev/null
        [ "$pids" = "$(cat /run/pilothouse/*.pid | sort)" ] || { echo "a second run restarted what ran well"; exit 1; }
    fi
    echo "=== round $round: reset"
    "$bootstrap" reset --force
    left=$(ps -eo pid=,ppid=,args= | grep -E 'pilothouse|containerd|etcd' | grep -v -E 'twice.sh|namespaces.sh|grep' || true)
    [ -z "$left" ] || { echo "processes are left: $left"; exit 1; }
    if ! diff <(echo "$before") <(picture); then
        echo "reset left the machine other than it was (< before, > after)"
        exit 1
    fi
done
echo "=== all well"
