# All that the flake gives, from nixpkgs and the workspace's folder.
{ pkgs, root }:
let
  # What steps take and which tools they need, and the tools' hashes: written by `cargo xtask nix pins`.
  pins = builtins.fromJSON (builtins.readFile ./pins.json);
  recipes = import ./recipes.nix { inherit (pkgs) lib; inherit root pins; };
  programs = import ./programs.nix { inherit pkgs root pins tools; };
  tools = import ./tools.nix { inherit pkgs root pins; inherit (programs) anneal; };
in
{
  inherit (programs) anneal;
  targets = import ./targets.nix { inherit pkgs root pins recipes programs tools; };

  checks = {
    inherit (programs) anneal;
    # Pinned results are fetched as they are: nothing else would tell that a row has changed since.
    pins = pkgs.runCommand "pins" { nativeBuildInputs = [ programs.anneal ]; } ''
      mkdir workspace; cd workspace; touch Cargo.toml
      cp -r --no-preserve=mode ${builtins.path { path = root + "/recipes"; name = "recipes"; }} recipes
      cp -r --no-preserve=mode ${builtins.path { path = root + "/site"; name = "site"; }} site
      anneal lock --check ${builtins.concatStringsSep " " (builtins.attrNames recipes)} >$out || { cat $out; exit 1; }
    '';
  };

  # `cargo xtask` brings its own libtorch and ONNX Runtime, with pip, and the page's libraries with npm.
  shell = pkgs.mkShell {
    packages = with pkgs;
      [ cargo rustc rustfmt clippy cmake pkg-config nodejs (python3.withPackages (python: [ python.pip ])) ];
    LIBCLANG_PATH = "${pkgs.libclang.lib}/lib";
    LD_LIBRARY_PATH = pkgs.lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib ];
  };
}
