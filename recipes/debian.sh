# Sourced: `debian_packages VENV PACKAGE...` unpacks Debian packages of data into VENV/debian, for which nobody needs to
# be root. What is unpacked or installed is left as it is.
debian_packages() {
    local target=$1/debian package work
    shift
    for package; do
        [ ! -e "$target/$package.unpacked" ] || continue
        if ! command -v apt-get >/dev/null; then
            echo "$package is not unpacked: there is no apt-get. What needs it says so." >&2
            continue
        fi
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" != installed ] || continue
        if ! apt-cache show "$package" >/dev/null 2>&1; then
            echo "apt-get does not know $package: its lists are updated." >&2
            apt-get update --quiet=2 || { echo "Run as root: apt-get update" >&2; return 1; }
        fi
        echo "unpacking the Debian package $package into $target" >&2
        work=$(mktemp -d) || return 1
        # the user _apt may not write here
        (cd "$work" && apt-get download --quiet=2 --option APT::Sandbox::User=root "$package") &&
            mkdir -p "$target" && dpkg-deb --extract "$work"/*.deb "$target" && touch "$target/$package.unpacked" ||
            { rm -r "$work"; echo "$package could not be downloaded and unpacked." >&2; return 1; }
        rm -r "$work"
    done
}
