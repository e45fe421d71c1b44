#!/bin/bash
# Installs etcd, and builds kube-apiserver, kube-controller-manager and kube-scheduler 1.20.2 into a
# folder, from Debian 12's source package and with its Go; offline once apt has fetched both. About
# 400 CPU-seconds, and 3 GB of disk while it builds. Does nothing when everything is there.
# usage: build-control-plane.sh [FOLDER]    (default /opt/kube-1.20.2/bin)
set -euo pipefail

folder=${1:-/opt/kube-1.20.2/bin}
programs=(kube-apiserver kube-controller-manager kube-scheduler)
fail() { echo "build-control-plane: $*" >&2; exit 1; }
has_tools() { command -v etcd && command -v openssl; } > /dev/null
is_built() { for p in "${programs[@]}"; do [ -x "$folder/$p" ] || return 1; done; }

has_tools && is_built && exit 0
[ "$(id -u)" = 0 ] || fail "needs root: it installs packages with apt-get"
mkdir -p "$folder"
exec 9> "$folder/.lock"
flock 9            # one build at a time; who waited finds it done
export DEBIAN_FRONTEND=noninteractive
get() { apt-get -o DPkg::Lock::Timeout=300 -qq "$@" > /dev/null || fail "apt-get $1 failed"; }
if ! has_tools; then
  echo "installing etcd"
  get update
  get install -y --no-install-recommends etcd-server openssl
fi
is_built && exit 0

work=$(mktemp -d --tmpdir chiasm-kube.XXXXXX)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

echo "installing the Go toolchain"
get update
get install -y --no-install-recommends \
  dpkg-dev gcc golang-go golang-github-modern-go-reflect2-dev jq make rsync

echo "fetching the source"
# The machine's own Debian mirrors, read as source archives by an apt with lists of its own.
mkdir -p "$work"/{sources,lists/partial,cache/archives/partial,home}
for file in /etc/apt/sources.list.d/*.sources; do
  [ ! -f "$file" ] || sed -E 's/^Types:.*/Types: deb-src/' "$file" > "$work/sources/${file##*/}"
done
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
  [ ! -f "$file" ] || sed -nE 's/^deb /deb-src /p' "$file" > "$work/sources/${file##*/}"
done
private=(
  -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources"
  -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root
)
apt-get "${private[@]}" -qq update
cd "$work"
apt-get "${private[@]}" -qq source --download-only kubernetes > /dev/null
dpkg-source -x kubernetes_*.dsc tree > /dev/null
cd tree
[ -d cmd/kube-apiserver ] || fail "this release's kubernetes source has no server; Debian 12's has"

# The vendored reflect2 1.0.1 crashes on the first custom resource when built with Go 1.18 or newer.
vendored=vendor/github.com/modern-go/reflect2
rm -f "$vendored"/*.{go,s}
cp /usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$vendored/"

echo "building"
cat > "$work/version" <<VERSION
KUBE_GIT_COMMIT=debian
KUBE_GIT_TREE_STATE=archive
KUBE_GIT_VERSION=v1.20.2
KUBE_GIT_MAJOR=1
KUBE_GIT_MINOR=20
VERSION
mkdir -p .go/src/k8s.io
ln -s ../../.. .go/src/k8s.io/kubernetes
env HOME="$work/home" GOPATH="$PWD/.go" CGO_ENABLED=0 KUBE_GIT_VERSION_FILE="$work/version" \
  make WHAT="$(printf 'cmd/%s ' "${programs[@]}")" > "$work/make.log" 2>&1 \
  || { tail -n 40 "$work/make.log" >&2; fail "make failed"; }

for program in "${programs[@]}"; do
  install -m 755 "_output/bin/$program" "$folder/.$program"
  mv "$folder/.$program" "$folder/$program"
done
echo "built into $folder"
