# shellcheck shell=bash disable=SC2034
# Functions shared by the scripts: messages, folders, quoting, and apt for another architecture. To be sourced, not run.

# Prints a progress message.
say() { printf '==> %s\n' "$*" >&2; }

# Prints a warning that does not end the script.
warn() { printf '==> warning: %s\n' "$*" >&2; }

# Ends the script with an error: what happened, to what, and what to do.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit "${DIE_CODE:-1}"
}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Downloads and build results; one per user, shared by all clones.
cache=${XDG_CACHE_HOME:-$HOME/.cache}/rvmm
# The folders of depmod and modprobe, which are not in every user's PATH.
PATH=$PATH:/usr/sbin:/sbin

rust_target=riscv64gc-unknown-linux-gnu

# True on a machine that needs no QEMU.
is_native() { [[ $(uname -m) == riscv64 && -c /dev/kvm ]]; }

# Quotes each argument for a POSIX shell, in one line.
quoted() {
    local word line=
    for word in "$@"; do
        line+=" '${word//\'/\'\\\'\'}'"
    done
    printf '%s' "${line# }"
}

# The folder of the kernel that HOST_KERNEL names: default (or nothing), backports or sid.
kernel_folder() {
    case ${1:-default} in
        default) printf '%s' "$cache/kernels/trixie" ;;
        backports) printf '%s' "$cache/kernels/trixie-backports" ;;
        sid) printf '%s' "$cache/kernels/sid" ;;
    esac
}

# The modules of the kernel that guests run.
guest_modules() {
    local kernel
    kernel=$(kernel_folder default)
    printf '%s' "$kernel/lib/modules/$(<"$kernel/version")"
}

# The folder of the Debian disk that this version of scripts/debian creates: root.img, Image, initrd.img, uboot.elf.
debian_folder() {
    printf '%s' "$cache/debian/$(cat "$repo"/scripts/debian "$repo"/scripts/rig/debian-* | sha256sum | cut -c1-12)"
}

# Prints "address<TAB>keyring" of the Debian archive that this machine installs from, never of a third party.
debian_source() {
    local codename file
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [[ -r $file ]] || continue
        awk -v codename="$codename" -v style="${file##*.}" '
            function done_stanza() {
                if (uri != "" && suites ~ ("(^| )" codename "( |$)") && types ~ /(^| )deb( |$)/ && enabled != "no")
                    found = uri "\t" key
                uri = suites = key = enabled = field = ""; types = ""
            }
            found != "" { next }
            style == "sources" && /^[[:space:]]*$/ { done_stanza(); next }
            style == "sources" && /^#/ { next }
            style == "sources" {
                if ($0 !~ /^[[:space:]]/) { field = tolower($1); $1 = "" }
                sub(/^ +/, "")
                if (field == "types:") types = $0
                if (field == "uris:" && uri == "") uri = $1
                if (field == "suites:") suites = suites " " $0
                if (field == "signed-by:" && $1 ~ /^\//) key = $1
                if (field == "enabled:") enabled = tolower($1)
                next
            }
            $1 == "deb" {
                key = ""; at = 2
                if ($0 ~ /\[/) {
                    if (match($0, /signed-by=[^] ,]+/)) key = substr($0, RSTART + 10, RLENGTH - 10)
                    sub(/\[[^]]*\]/, "")
                }
                if ($3 == codename) found = $2 "\t" key
            }
            END { if (found == "") done_stanza(); if (found != "") print found }
        ' "$file"
    done | head -n 1
}

# Runs apt for one architecture and suite with its own state folder: foreign_apt ARCH SUITE TOOL ARGS...
# The machine's own package state is neither read nor changed.
foreign_apt() {
    local arch=$1 suite=$2 tool=$3 state=$cache/apt/$1-$2
    shift 3
    "$tool" -o APT::Architecture="$arch" -o APT::Architectures::="$arch" \
        -o Dir::State::Lists="$state/lists" -o Dir::State::status="$state/status" \
        -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::Cache="$state/cache" -o Dir::Cache::Archives="$state/cache/archives" \
        -o APT::Sandbox::User="$(id -un)" -o APT::Get::AllowUnauthenticated=false \
        -o Acquire::Languages=none -o Acquire::Retries=3 -q "$@"
}

# Fetches the index of a suite: foreign_update ARCH SUITE.
foreign_update() {
    local arch=$1 suite=$2 state=$cache/apt/$1-$2 address keyring
    IFS=$'\t' read -r address keyring < <(debian_source) || true
    [[ -n ${address:-} ]] || die "No Debian archive among this machine's apt sources (add one to /etc/apt/sources.list.d, then run scripts/setup again)"
    keyring=${keyring:-/usr/share/keyrings/debian-archive-keyring.gpg}
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    : >"$state/status"
    printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$address" "$suite" >"$state/sources.list"
    say "reading the package index of $suite for $arch"
    # On a mirror that is being updated one compression may be complete and another not.
    foreign_apt "$arch" "$suite" apt-get update >"$state/update.log" 2>&1 ||
        foreign_apt "$arch" "$suite" apt-get -o Acquire::CompressionTypes::Order::=gz update >"$state/update.log" 2>&1 || {
        cat "$state/update.log" >&2
        return 1
    }
}

# Downloads packages of an architecture and unpacks them: foreign_unpack ARCH SUITE FOLDER PACKAGE...
foreign_unpack() {
    local arch=$1 suite=$2 folder=$3 debs file
    shift 3
    mkdir -p "$folder"
    debs=$cache/tmp.debs.$$
    rm -rf "$debs"
    mkdir "$debs"
    (cd "$debs" && foreign_apt "$arch" "$suite" apt-get download "$@" >download.log 2>&1) || {
        cat "$debs/download.log" >&2
        rm -rf "$debs"
        return 1
    }
    for file in "$debs"/*.deb; do
        dpkg-deb -x "$file" "$folder"
    done
    rm -rf "$debs"
}
