# The command line and the workers, compiled as `cargo xtask build` compiles them.
{ pkgs, root, pins, tools }:
let
  inherit (pkgs) lib;
  inherit (builtins) attrNames attrValues concatStringsSep elem filter listToAttrs;

  # What cargo reads. A recipe or a page that changes compiles nothing.
  source = lib.cleanSourceWith {
    name = "anneal-source";
    src = root;
    filter = path: _:
      let relative = lib.removePrefix "${toString root}/" (toString path); in
      builtins.any
        (kept: relative == kept || lib.hasPrefix "${kept}/" relative || lib.hasPrefix "${relative}/" kept)
        [ "Cargo.toml" "Cargo.lock" "crates" "xtask" "recipes/demo/generator" ];
  };

  compile = name: packages: families: extra: pkgs.rustPlatform.buildRustPackage ({
    pname = name;
    inherit ((builtins.fromTOML (builtins.readFile (root + "/Cargo.toml"))).workspace.package) version;
    src = source;
    cargoLock.lockFile = root + "/Cargo.lock";
    buildPhase = ''
      runHook preBuild
      cargo build --release --frozen -j $NIX_BUILD_CORES \
        ${concatStringsSep " " (map (package: "--package ${package}") (packages ++ families))} \
        ${concatStringsSep " " (map (family: "--features ${family}/worker --bin ${family}-worker") families)} \
        ${concatStringsSep " " (map (package: "--bin ${package}") packages)}
    '';
    installPhase = ''
      ${concatStringsSep "\n" (map (family: "install -D -t $out/libexec/anneal target/release/${family}-worker") families)}
    '' + extra.install or "";
    doCheck = false;
  } // removeAttrs extra [ "install" ]);

  # Families whose workers link nothing heavy are compiled in one call, for they share most of their crates.
  # `cargo xtask build` compiles each by itself; what they then agree on are features that compute nothing
  # (`cargo tree -f "{p} {f}"`).
  heavy = {
    train = { LIBTORCH = "${tools.libtorch}/torch"; };
    eval = {
      nativeBuildInputs = [ pkgs.cmake ];
      dontUseCmakeConfigure = true;
      LIBCLANG_PATH = "${pkgs.libclang.lib}/lib";
      # Without the clang program there are no headers of its own: gcc's serve.
      preBuild = "export BINDGEN_EXTRA_CLANG_ARGS=-I$(cc -print-file-name=include)";
    };
  };
  made = filter (step: !step.network) (attrValues pins.steps);
  families = attrNames (listToAttrs (map (step: { name = step.family; value = null; }) made));
  light = filter (family: !heavy ? ${family}) families;

  anneal = compile "anneal" [ "xtask" ] light {
    install = "install -D target/release/xtask $out/bin/anneal";
    meta.mainProgram = "anneal";
  };
  alone = family: compile "anneal-${family}" [ ] [ family ] heavy.${family};
in
{
  inherit anneal;
  worker = family:
    "${if elem family light then anneal else alone family}/libexec/anneal/${family}-worker";
}
