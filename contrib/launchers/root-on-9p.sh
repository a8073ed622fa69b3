#!/bin/sh
# root-on-9p.sh KERNEL ROOT [KERNEL ARGUMENT...]: a guest whose root file system is the directory ROOT, for
# work on kernels: nothing is packed, and what the guest writes is there at once.
#
#   root-on-9p.sh arch/x86/boot/bzImage /srv/guests/debian init=/bin/bash
#   INITRD=initrd root-on-9p.sh /boot/vmlinuz /srv/guests/debian
#
# KERNEL has CONFIG_9P_FS, CONFIG_NET_9P_VIRTIO and CONFIG_VIRTIO_PCI built in, or INITRD mounts the tag
# "root". MEMORY, QEMU, ACCEL and NINEPD_OPTIONS may be set. ROOT lies where other users cannot
# get to, if this is run by root; by another user the guest's root owns what that user owns.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 KERNEL ROOT [KERNEL ARGUMENT...]" >&2
    exit 2
fi
kernel=$1 root=$2
shift 2

memory=${MEMORY:-512M}
folder=$(mktemp -d)
daemon=
finish() {
    [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || :
    wait
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

set -- "root=root" "rootfstype=9p" "rw" \
    "rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose" "panic=-1" "$@"
if [ "$(id -u)" != 0 ]; then
    NINEPD_OPTIONS="--map-uid 0:$(id -u):1 --map-gid 0:$(id -g):1 ${NINEPD_OPTIONS:-}"
fi
# shellcheck disable=SC2086 # several words
ninepd serve --export "$root" --tag root --socket-path "$folder/socket" ${NINEPD_OPTIONS:-} &
daemon=$!
while [ ! -S "$folder/socket" ]; do
    kill -0 "$daemon" # it has said why
    sleep 0.1
done

accel=tcg
[ ! -w /dev/kvm ] || accel=kvm
# shellcheck disable=SC2046 # several words, none with blanks
${QEMU:-qemu-system-x86_64} $(ninepd qemu-args --socket-path "$folder/socket" --tag root --memory "$memory") \
    -accel "${ACCEL:-$accel}" -cpu max -nodefaults -no-reboot -display none -serial stdio \
    -kernel "$kernel" ${INITRD:+-initrd "$INITRD"} -append "console=ttyS0 $*"
