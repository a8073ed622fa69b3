#!/bin/sh
# Installs what building and testing ninepd needs on Debian, or names it if that is not allowed.
set -eu

missing=
need() { # need PACKAGE CHECK...: the package, unless the check holds
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}
has_header() { echo "#include <$1>" | cc -E - ; }
links_statically() {
    folder=$(mktemp -d) && echo 'int main(void) { return 0; }' |
        cc -static -x c -o "$folder/a.out" - && rm -r "$folder"
}

python=${PYTHON:-python3}
need gcc command -v gcc
need libc6-dev links_statically
need python3-dev "$python" -c \
    'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))'
need python3-venv "$python" -c 'import ensurepip, venv'
need bc command -v bc
need bison command -v bison
need flex command -v flex
need xz-utils command -v xz
need binutils command -v ld
need perl perl -e 'use strict'
need tar command -v tar
need debian-archive-keyring test -e /usr/share/keyrings/debian-archive-keyring.gpg
need e2fsprogs command -v mkfs.ext4
need util-linux command -v setpriv
need libfuse3-3 "$python" -c 'import ctypes; ctypes.CDLL("libfuse3.so.3")'
need strace command -v strace
need ca-certificates test -d /etc/ssl/certs

[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "ninepd: these packages are missing; as root: apt-get install$missing" >&2
    exit 2
fi
echo "ninepd: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# The packages' names hold no spaces.
# shellcheck disable=SC2086
apt-get -qq install --no-install-recommends $missing >/dev/null
