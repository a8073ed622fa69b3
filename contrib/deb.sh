#!/bin/sh
# deb.sh BIN: the Debian package in dist/, for the release that this runs on, and its source package,
# which builds on the other one, too, and without a network. BIN is the folder of pip and python.
#
# Debian wants debian/ on top, so the sources are laid out anew in build/deb.
set -eu

bin=$1
pythons="3.11 3.13" # of Debian 12 and 13

version=$("$bin/python" -c 'import ninepd; print(ninepd.__version__)')
tree=build/deb/ninepd-$version
rm -rf build/deb
mkdir -p build/deb dist
"$bin/python" setup.py --quiet sdist --dist-dir build/deb
tar -C build/deb -xf "build/deb/ninepd-$version.tar.gz"
rm -r "build/deb/ninepd-$version.tar.gz" "$tree/ninepd.egg-info"
mv "$tree/contrib/debian" "$tree/debian"

"$bin/python" -c "
import tomllib
project = tomllib.load(open('pyproject.toml', 'rb'))
print(*project['build-system']['requires'], *project['project']['dependencies'], sep='\n')
" >build/deb/requirements.txt
for python in $pythons; do
    "$bin/pip" --disable-pip-version-check download --quiet --dest "$tree/debian/wheels" \
        --only-binary=:all: --python-version "$python" --requirement build/deb/requirements.txt
done

(cd "$tree" && dpkg-buildpackage --unsigned-source --unsigned-changes)
mv build/deb/ninepd_* dist
ls -l dist
