# A derivation for each target. What its recipe's lock pins is fetched by that hash; all else is made by
# our workers, from what the derivations of its inputs gave.
{ pkgs, root, pins, recipes, programs, tools }:
let
  inherit (pkgs) lib;
  inherit (builtins) attrNames attrValues concatMap concatStringsSep filter listToAttrs mapAttrs;

  settings = (builtins.fromTOML (builtins.readFile (root + "/Cargo.toml"))).workspace.metadata.anneal or { };
  # The shared cache, by the URL that builds take it from.
  remote = settings.remote or null;
  # Nix takes an endpoint apart: a scheme and a host.
  endpoint = builtins.match "(https?)://([^/]+)/*" (settings.remote-endpoint or "");
  where = lib.optionals (lib.hasPrefix "s3://" remote) (
    lib.optional (settings ? remote-region) "region=${settings.remote-region}"
    ++ lib.optionals (endpoint != null) [ "scheme=${builtins.elemAt endpoint 0}" "endpoint=${builtins.elemAt endpoint 1}" ]);
  query = lib.optionalString (where != [ ]) "?${concatStringsSep "&" where}";

  derivations = mapAttrs (recipe: of: mapAttrs (_: derive of) of.targets) recipes;
  named = { recipe, target, ... }: "${recipe}-${target}";
  id = { recipe, target, ... }: "${recipe}/${target}";

  derive = of: target:
    let result = of.results.${target.target} or null; in
    if result != null && remote != null then fetched target result
    else if pins.steps.${target.step}.network then missing target
    else made target;

  # Fails when it is built, and not before: the flake's other packages can be looked at without it.
  missing = target: pkgs.runCommand (named target) { } ''
    echo "error: ${id target} comes from the network, and its result is not pinned" >&2
    echo "  = hint: build it, pin it with cargo xtask lock ${target.recipe}, and put it into the shared cache (README.md, With Nix)" >&2
    exit 1
  '';

  # Nix's own fetcher: it unpacks the archive and holds it to the hash.
  fetched = target: result: import <nix/fetchurl.nix> {
    name = named target;
    url = "${lib.removeSuffix "/" remote}/nar/${result.sha256}.nar${query}";
    inherit (result) sha256;
    unpack = true;
  };

  made = target:
    let
      step = pins.steps.${target.step};
      files = filter (input: input ? path) target.inputs;
      upstream = filter (input: input ? target) target.inputs;
      # The kinds of inputs stand in their recipes.
      read = attrNames (listToAttrs (map (one: { name = one.recipe; value = null; }) ([ target ] ++ upstream)));
      recipe = name: ''
        cp ${builtins.path { path = root + "/recipes/${name}.toml"; name = "recipe.toml"; }} recipes/${name}.toml
      '';
      file = { path }: ''
        mkdir -p "$(dirname ${lib.escapeShellArg "recipes/${path}"})"
        cp -r --no-preserve=mode ${builtins.path { path = root + "/recipes/${path}"; name = "input"; }} ${lib.escapeShellArg "recipes/${path}"}
      '';
      arguments = [ (id target) "--worker" (programs.worker step.family) "--out" "$out" ]
        ++ concatMap (input: [ "--input" "${id input}=${derivations.${input.recipe}.${input.target}}" ]) upstream
        ++ concatMap (tool: [ "--tool" "${tool}=${tools.${tool}}" ]) step.tools;
    in
    pkgs.runCommand (named target)
      {
        nativeBuildInputs = [ programs.anneal ];
        # The pinned libraries look for the C++ library by name.
        LD_LIBRARY_PATH = lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib ];
      } ''
      mkdir -p workspace/recipes; cd workspace; touch Cargo.toml
      ${concatStringsSep "" (map recipe read ++ map file files)}
      anneal nix make ${concatStringsSep " " arguments}
    '';
in
listToAttrs (concatMap (of: map (target: { name = named target; value = derivations.${target.recipe}.${target.target}; })
  (attrValues of.targets)) (attrValues recipes))
