# Tools that take part in results, by their hashes: the very files that `cargo xtask build` uses. nixpkgs'
# own libtorch and ONNX Runtime are of other versions, and would give other bytes.
{ pkgs, root, pins, anneal }:
builtins.mapAttrs
  (tool: pin: pkgs.runCommand pin.name
    {
      outputHashMode = "recursive";
      outputHashAlgo = "sha256";
      outputHash = pin.sha256;
      nativeBuildInputs = [ anneal (pkgs.python3.withPackages (python: [ python.pip ])) pkgs.nodejs pkgs.cacert ];
      impureEnvVars = pkgs.lib.fetchers.proxyImpureEnvVars ++ [ "PIP_INDEX_URL" "NPM_CONFIG_REGISTRY" ];
    } ''
    export HOME=$PWD
    mkdir -p workspace/recipes workspace/site; touch workspace/Cargo.toml
    cp ${builtins.path { path = root + "/site/package.json"; name = "package.json"; }} workspace/site/package.json
    cp ${builtins.path { path = root + "/site/package-lock.json"; name = "package-lock.json"; }} workspace/site/package-lock.json
    cp -r "$(anneal --workspace workspace nix tool ${tool})" $out
  '')
  pins.tools
