# The part of nixpkgs that our flake uses, made of this machine's own programs: for tests where nixpkgs
# cannot be fetched. Not hermetic: what is installed here takes part.
#
#     nix build .#demo-site --override-input nixpkgs path:FOLDER
#
# FOLDER is a copy of this one with a host.json, which tests/nix/run.sh writes:
#   path         where programs are found inside the sandbox
#   crates       the folder of .crate files that `cargo fetch` has filled
#   fingerprint  the versions of compilers, so that others give other derivations
{
  outputs = { self }:
    let
      system = "x86_64-linux";
      host = builtins.fromJSON (builtins.readFile ./host.json);

      lib = rec {
        genAttrs = names: f: builtins.listToAttrs (map (name: { inherit name; value = f name; }) names);
        hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
        hasSuffix = suffix: text:
          let over = builtins.stringLength text - builtins.stringLength suffix; in
          over >= 0 && builtins.substring over (-1) text == suffix;
        removePrefix = prefix: text:
          if hasPrefix prefix text then builtins.substring (builtins.stringLength prefix) (-1) text else text;
        removeSuffix = suffix: text:
          if hasSuffix suffix text
          then builtins.substring 0 (builtins.stringLength text - builtins.stringLength suffix) text
          else text;
        optionals = yes: list: if yes then list else [ ];
        optional = yes: one: optionals yes [ one ];
        optionalString = yes: text: if yes then text else "";
        escapeShellArg = text: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] text}'";
        makeLibraryPath = paths: builtins.concatStringsSep ":" (map (path: "${path}/lib") paths);
        cleanSourceWith = { src, name, filter }: builtins.path { inherit name filter; path = src; };
        fetchers.proxyImpureEnvVars = [ "http_proxy" "https_proxy" "no_proxy" "HTTPS_PROXY" ];
      };

      mkDerivation = attrs: { meta = attrs.meta or { }; } // derivation (removeAttrs attrs [ "meta" "cargoLock" "nativeBuildInputs" ] // {
        inherit system;
        name = attrs.name or "${attrs.pname}-${attrs.version}";
        builder = "/bin/bash";
        args = [ "-e" ./builder.sh ];
        PATH = builtins.concatStringsSep ":"
          (map (input: "${input}/bin") (attrs.nativeBuildInputs or [ ]) ++ [ host.path ]);
        inherit (host) fingerprint;
      });

      crate = { name, version, checksum, ... }: builtins.fetchurl {
        url = "file://${host.crates}/${name}-${version}.crate";
        sha256 = checksum;
      };
      # What the host has needs no place of its own.
      there = "/usr";
    in
    {
      inherit lib;
      legacyPackages.${system} = rec {
        inherit lib;
        stdenv = { inherit mkDerivation; cc.cc.lib = there; };
        runCommand = name: attrs: buildPhase: mkDerivation (attrs // { inherit name buildPhase; });
        mkShell = attrs: mkDerivation (removeAttrs attrs [ "packages" ] // { name = "shell"; buildPhase = "export > $out"; });
        rustPlatform.buildRustPackage = attrs: mkDerivation (attrs // {
          crates = map (package: "${crate package} ${package.name}-${package.version} ${package.checksum}\n")
            (builtins.filter (package: package ? checksum)
              (builtins.fromTOML (builtins.readFile attrs.cargoLock.lockFile)).package);
          passAsFile = [ "crates" ];
        });
        libclang.lib = there;
        cargo = there; rustc = there; rustfmt = there; clippy = there; cmake = there; pkg-config = there;
        nodejs = there; cacert = there;
        python3.withPackages = _: there;
      };
    };
}
