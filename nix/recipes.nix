# recipes/*.toml as Nix sees them: which targets there are, and what each is made of. What the other
# keys mean, `anneal nix make` knows.
{ lib, root, pins }:
let
  inherit (builtins) attrNames concatLists concatMap concatStringsSep elemAt filter foldl' isFloat isList
    isString listToAttrs mapAttrs match replaceStrings toJSON;

  folder = root + "/recipes";
  names = map (lib.removeSuffix ".toml") (filter (lib.hasSuffix ".toml") (attrNames (builtins.readDir folder)));
  toml = path: if builtins.pathExists path then builtins.fromTOML (builtins.readFile path) else { };

  read = recipe:
    let
      tables = mapAttrs expand (toml (folder + "/${recipe}.toml"));
      target = { name, table }: {
        inherit name;
        value = { inherit recipe; target = name; inherit (table) step; inputs = inputs recipe table; };
      };
      published = one: lib.hasPrefix "publish/" one.table.step;
    in
    {
      # Results that are fetched and not made, by target.
      results = (toml (folder + "/${recipe}.lock")).results or { };
      targets = listToAttrs (map target (filter (one: !published one) (concatLists (builtins.attrValues tables))));
      # What a name stands for: the target, or all that a matrix made of it.
      named = name: map (one: one.name) (tables.${name} or [ { inherit name; } ]);
    };
  recipes = listToAttrs (map (name: { inherit name; value = read name; }) names);

  # What a table is made of: `{ path }`, or `{ recipe, target }`.
  inputs = recipe: table:
    let
      step = pins.steps.${table.step} or (throw
        "recipes/${recipe}.toml has a step `${table.step}` that nix/pins.json has not: run `cargo xtask nix pins`");
      texts = key: let value = table.${key} or [ ]; in if isList value then value else [ value ];
    in
    concatMap (input recipe) (concatMap texts step.inputs);
  input = recipe: text:
    let
      elsewhere = match "([^/]*)/(.*)" text;
      from = if elsewhere == null then recipe else elemAt elsewhere 0;
      name = if elsewhere == null then text else elemAt elsewhere 1;
    in
    if lib.hasPrefix "." text then [ { path = text; } ]
    else map (target: { recipe = from; inherit target; }) (recipes.${from}.named name);

  # The tables that a table stands for: itself, or one for each combination of its matrix.
  expand = name: table:
    let
      axis = variants: key: concatMap (vary key table.matrix.${key}) variants;
      vary = key: values: variant: map
        (value: { name = "${variant.name}-${key}-${word value}"; table = variant.table // { ${key} = value; }; })
        values;
    in
    foldl' axis [ { inherit name; table = removeAttrs table [ "matrix" ]; } ] (attrNames (table.matrix or { }));

  # A value as a part of a target's name: `0.5` is `0_5`.
  word = value:
    let
      text =
        if isString value then value
        else if isList value then concatStringsSep "_" (map word value)
        else if isFloat value then float (toJSON value)
        else toJSON value;
    in
    concatStringsSep "_" (filter isString (builtins.split "[^[:alnum:]-]" text));
  # As Rust writes it, where it is less than a million: `1.0` for `1`, `0.000015` for `1.5e-05`, `1e-6` for `1e-06`.
  float = text:
    let
      small = match "(.*)e-0*([0-9]+)" text;
      digits = replaceStrings [ "." ] [ "" ] (elemAt small 0);
    in
    if small != null then if elemAt small 1 == "5" then "0.0000${digits}" else "${elemAt small 0}e-${elemAt small 1}"
    else if match ".*[.].*" text == null then "${text}.0"
    else text;
in
recipes
