# Each target of each recipe as a Nix package: `nix build .#demo-site`.
#
# flake.lock was written by hand: there was no network where this was made. Its commit is nixos-26.05 of
# 2026-09-18, whose rustc is the 1.95.0 of rust-toolchain.toml; its hash is the one under which others pin
# that commit. What the tests evaluate and build is nix/host-pkgs, a stand-in with the same attributes.
{
  description = "Anneal: recipes of fine-tuned small language models, and what they make";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";

  outputs = { self, nixpkgs }:
    let
      # The tools that take part in results are pinned for this platform (crates/engine/src/tools).
      systems = [ "x86_64-linux" ];
      each = f: nixpkgs.lib.genAttrs systems (system:
        f (import ./nix { pkgs = nixpkgs.legacyPackages.${system}; root = ./.; }));
    in
    {
      packages = each (all: all.targets // { inherit (all) anneal; default = all.anneal; });
      checks = each (all: all.checks);
      devShells = each (all: { default = all.shell; });
    };
}
