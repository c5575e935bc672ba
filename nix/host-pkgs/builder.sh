# The stand-in's builder: unpacks sources and crates, builds, installs.
export HOME=$NIX_BUILD_TOP LC_ALL=C TZ=UTC
umask 022
cd "$NIX_BUILD_TOP"

if [ -n "${src:-}" ]; then
    cp -r --no-preserve=mode "$src" source
    cd source
fi
if [ -n "${cratesPath:-}" ]; then
    # Below the sources, so that their paths are the same in every build.
    mkdir -p vendor .cargo
    while read -r archive name checksum; do
        [ -n "$archive" ] || continue
        tar --extract --gzip --file "$archive" --directory vendor
        printf '{"files":{},"package":"%s"}' "$checksum" >"vendor/$name/.cargo-checksum.json"
    done <"$cratesPath"
    printf '[source.crates-io]\nreplace-with = "vendored"\n[source.vendored]\ndirectory = "vendor"\n' >.cargo/config.toml
    export CARGO_HOME=$NIX_BUILD_TOP/cargo
fi
# Phases call it, as nixpkgs' do.
runHook() { eval "${!1:-}"; }
eval "$buildPhase"
eval "${installPhase:-}"
