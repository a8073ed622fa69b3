#!/bin/sh
# completions.sh ROOT PROGRAM...: what click has for the shells to complete the programs of ROOT.
set -eu

root=$1
shift
write() { # write SHELL PROGRAM FILE
    variable=_$(echo "$2" | tr a-z- A-Z_)_COMPLETE
    mkdir -p "$root/usr/share/${3%/*}"
    env "$variable=$1_source" /usr/bin/python3 -IBc "
import runpy, sys
sys.path.insert(0, '$root/usr/lib/ninepd')
sys.argv = ['$2']
runpy.run_path('$root/usr/bin/$2')" >"$root/usr/share/$3"
}
for program; do
    write bash "$program" "bash-completion/completions/$program"
    write zsh "$program" "zsh/vendor-completions/_$program"
    write fish "$program" "fish/vendor_completions.d/$program.fish"
done
