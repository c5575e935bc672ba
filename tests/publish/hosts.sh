#!/usr/bin/env bash
# The demo's site behind nginx and Caddy, each with the file that lies beside the site for it: every
# byte and header as `publish check` asks for them, and a header that was taken out is missed by name.
set -euo pipefail
cd "$(dirname "$0")/../.."
site=$(realpath "${ANNEAL_DEMO:-artifacts/demo}")/site
work=$PWD/target/hosts
tools=$PWD/target/hosts-tools
xtask() { cargo run --quiet --locked --package xtask -- "$@"; }
fail() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf '  = hint: %s\n' "$2" >&2; exit 1; }

# Their programs alone: installed, they would start to serve at once.
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
export PATH=$PATH:/usr/sbin:$tools/usr/sbin:$tools/usr/bin
for name in nginx caddy; do
    command -v $name >/dev/null && continue
    command -v apt-get >/dev/null || fail "there is no $name" "install it, and run this stage again"
    mkdir -p "$tools"
    (cd "$tools" && { apt-get download $name || { "${as_root[@]}" apt-get update && apt-get download $name; }; } &&
        dpkg --extract ${name}_*.deb .) >"$tools/$name.log" 2>&1 || fail "apt-get cannot fetch $name: see $tools/$name.log"
done

rm -rf "$work"
mkdir -p "$work"
server=
trap '[ -z "$server" ] || kill "$server"' EXIT

# serve nginx|caddy FILE: the site at $url, with FILE for the headers.
serve() {
    local port config=$work/$1.conf
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    case $1 in
    nginx)
        # Without this, workers of a server that root starts may not read the site.
        local user=''
        [ "$(id -u)" != 0 ] || user='user root;'
        cat >"$config" <<NGINX
daemon off;
$user
pid $work/nginx.pid;
events {}
http {
    access_log off;
    client_body_temp_path $work/body;
    proxy_temp_path $work/proxy;
    fastcgi_temp_path $work/fastcgi;
    uwsgi_temp_path $work/uwsgi;
    scgi_temp_path $work/scgi;
    server { listen 127.0.0.1:$port; root $site; include $2; }
}
NGINX
        nginx -e stderr -p "$work" -c "$config" >"$work/$1.log" 2>&1 &
        ;;
    caddy)
        printf '{\n admin off\n auto_https off\n}\n%s {\n bind 127.0.0.1\n root * %s\n import %s\n file_server\n}\n' \
            "$url" "$site" "$2" >"$config"
        HOME=$work caddy run --config "$config" --adapter caddyfile >"$work/$1.log" 2>&1 &
        ;;
    esac
    server=$!
    for _ in $(seq 100); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    cat "$work/$1.log" >&2
    fail "$1 does not serve"
}
stop() {
    kill "$server"
    wait "$server" || true
    server=
}

for host in nginx:nginx.conf caddy:Caddyfile; do
    name=${host%:*}
    file=$site/hosts/${host#*:}
    serve "$name" "$file"
    xtask publish check "$url" >"$work/$name.check" 2>&1 || { cat "$work/$name.check" >&2; fail "$name does not serve the site as it should be"; }
    stop
    grep -v Cross-Origin-Embedder-Policy "$file" >"$work/without"
    serve "$name" "$work/without"
    ! xtask publish check "$url" >"$work/$name.check" 2>&1 || fail "behind $name, a header is missing and nothing says so"
    grep -q "Cross-Origin-Embedder-Policy is missing" "$work/$name.check" || { cat "$work/$name.check" >&2; fail "behind $name, the missing header is not named"; }
    stop
    echo "$name: every byte and header; a missing header is named"
done
