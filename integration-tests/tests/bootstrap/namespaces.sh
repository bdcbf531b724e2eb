#!/usr/bin/env bash
# Runs a command on a throwaway machine: mount, host name, network and process namespaces of its own, with copies of
# /etc, /var, /usr/local and /root that are written to and an empty /run. Nothing reaches the machine outside, and the end
# of the command is the end of every process in it.
#   namespaces.sh DIRECTORY COMMAND...
set -euo pipefail

directory=$1
shift
if [ "${INSIDE:-}" != "$directory" ]; then
    mkdir -p "$directory"/{upper,work}/{etc,var,usr-local,root} "$directory"/{containerd,etcd,kubelet}
    INSIDE=$directory exec unshare --mount --uts --net --pid --fork --kill-child --propagation slave "$0" "$directory" "$@"
fi

mount --make-rshared /
mount -t proc proc /proc
for path in etc var usr/local root; do
    name=${path//\//-}
    mount -t overlay overlay -o "lowerdir=/$path,upperdir=$directory/upper/$name,workdir=$directory/work/$name" "/$path"
done
# What containerd and etcd write must not lie on an overlay.
for path in containerd etcd kubelet; do
    mkdir -p "/var/lib/$path"
    mount --bind "$directory/$path" "/var/lib/$path"
done
mount -t tmpfs tmpfs /run
mkdir -p /run/netns /run/lock
mount --make-rshared /
hostname pilothouse-test

# A machine with one address and a default route that leads nowhere.
ip link set lo up
ip link add eth0 type veth peer name eth0-peer
ip link set eth0 up
ip link set eth0-peer up
ip address add 10.200.28.11/24 dev eth0
ip route add default via 10.200.28.1

# Process 1 must outlive the command's children, and must not be replaced by it.
"$@"
