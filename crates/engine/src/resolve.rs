//! Recipes become a graph: each target with its step's definition, full parameters and inputs.
//!
//! Every mistake that a recipe can hold is found here, before anything runs, and shown at its
//! place in the file. Looks at whether input files exist, never at what is in them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use recipe::{Diagnostic, InputRef, Lock, Recipe, Span, nearest};
use serde_json::{Map, Value};
use step::definition::{Known, KnownInput};
use step::{Arity, Facts, Family, InputDef, Kind, StepDef};

use crate::Error;
use crate::target::TargetId;

/// The steps that a program knows: an explicit list, put together by whoever owns `main`.
#[derive(Debug, Clone, Copy)]
pub struct Registry {
    pub families: &'static [&'static Family],
}

impl Registry {
    pub fn step(&self, name: &str) -> Option<(&'static Family, &'static StepDef)> {
        self.families
            .iter()
            .flat_map(|family| family.steps.iter().map(move |step| (*family, step)))
            .find(|(_, step)| step.name == name)
    }

    pub fn steps(&self) -> impl Iterator<Item = &'static StepDef> {
        self.families.iter().flat_map(|family| family.steps)
    }
}

/// A target, resolved.
#[derive(Debug)]
pub struct Node {
    pub id: TargetId,
    pub family: &'static Family,
    pub def: &'static StepDef,
    /// What it makes.
    pub kind: Kind,
    /// Defaults filled in; the pin of a locked source is under `lock`.
    pub params: Value,
    pub inputs: Vec<Input>,
    /// A locked source whose pin is missing, or was made for other parameters.
    pub unlocked: bool,
}

impl Node {
    /// The targets that it takes as inputs.
    pub fn targets(&self) -> impl Iterator<Item = &TargetId> {
        self.inputs.iter().filter_map(|input| match &input.from {
            Origin::Target(id) => Some(id),
            Origin::Path { .. } => None,
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The step's name for it: `models`.
    pub name: &'static str,
    /// Its name in the action: `models.merged` where the input takes many, else `name`.
    pub field: String,
    /// The target's name, or the file's.
    pub label: String,
    pub kind: Kind,
    pub from: Origin,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Target(TargetId),
    /// A file or folder of the user; `shown` is relative to the workspace.
    Path {
        path: PathBuf,
        shown: String,
    },
}

/// Targets in an order in which inputs come before what uses them.
#[derive(Debug, Default)]
pub struct Graph {
    pub nodes: Vec<Node>,
    /// The targets that were asked for; the other nodes are what these hang on.
    pub wanted: BTreeSet<TargetId>,
}

impl Graph {
    pub fn get(&self, id: &TargetId) -> Option<&Node> {
        self.nodes.iter().find(|n| n.id == *id)
    }

    /// What is known of each node's inputs, and of itself, before it is built. `read` tells what a
    /// file of a target's last artifact says.
    pub fn facts(
        &self,
        read: &dyn Fn(&TargetId, &str) -> Option<Value>,
    ) -> BTreeMap<TargetId, (Known, Facts)> {
        let mut all: BTreeMap<TargetId, (Known, Facts)> = BTreeMap::new();
        for node in &self.nodes {
            let mut known = Known::new();
            for input in &node.inputs {
                let facts = match &input.from {
                    Origin::Target(id) => all.get(id).map(|(_, f)| f.clone()).unwrap_or_default(),
                    Origin::Path { .. } => Facts::default(),
                };
                known.entry(input.name.into()).or_default().push(KnownInput {
                    label: input.label.clone(),
                    kind: input.kind,
                    facts,
                });
            }
            let mut facts = (node.def.facts)(&node.params, &known);
            if facts.config.is_none() && node.kind == Kind::Model {
                facts.config = read(&node.id, "config.json");
            }
            if node.kind == Kind::Dataset {
                facts.dataset = read(&node.id, "dataset.json");
            }
            all.insert(node.id.clone(), (known, facts));
        }
        all
    }
}

/// Reads recipes on demand and resolves targets.
pub struct Resolver<'a> {
    root: &'a Path,
    registry: Registry,
    recipes: BTreeMap<String, Rc<(Recipe, Lock)>>,
}

impl<'a> Resolver<'a> {
    /// `root` is the workspace; recipes lie in its `recipes` folder.
    pub fn new(root: &'a Path, registry: Registry) -> Self {
        Self { root, registry, recipes: BTreeMap::new() }
    }

    /// The names of all recipes.
    pub fn recipe_names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join("recipes")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|e| e.file_name().to_str()?.strip_suffix(".toml").map(str::to_string))
            .collect();
        names.sort();
        names
    }

    /// What a person typed → targets: `demo/site`; `demo`, all of a recipe; `site`, of the demo.
    pub fn expand(&mut self, words: &[String]) -> Result<Vec<TargetId>, Error> {
        self.find(words).map_err(|e| e.relative_to(self.root))
    }

    fn find(&mut self, words: &[String]) -> Result<Vec<TargetId>, Error> {
        let mut out = Vec::new();
        for word in words {
            if let Some((recipe, target)) = word.split_once('/') {
                self.recipe(recipe, None)?;
                out.extend(self.existing(TargetId::new(recipe, target))?);
            } else if self.recipe_names().contains(word) {
                let tables = &self.recipe(word, None)?.0.targets;
                let acts = |name: &str| self.registry.step(name).is_some_and(|(_, step)| step.acts);
                let all = tables.iter().filter(|t| !acts(&t.step.value));
                out.extend(all.map(|t| TargetId::new(word, &t.name)));
            } else {
                self.recipe(DEFAULT_RECIPE, None)?;
                out.extend(self.existing(TargetId::new(DEFAULT_RECIPE, word))?);
            }
        }
        Ok(out)
    }

    /// The graph of `wanted` and all that they need.
    pub fn graph(&mut self, wanted: &[TargetId]) -> Result<Graph, Error> {
        let mut graph = Graph { nodes: Vec::new(), wanted: wanted.iter().cloned().collect() };
        let mut done = BTreeSet::new();
        for id in wanted {
            self.visit(id, &mut Vec::new(), &mut done, &mut graph)
                .map_err(|e| e.relative_to(self.root))?;
        }
        Ok(graph)
    }

    /// One target, without those that it needs: their files need not be there.
    pub fn alone(&mut self, id: &TargetId) -> Result<Node, Error> {
        self.recipe(&id.recipe, None)
            .and_then(|_| self.node(id))
            .map(|(node, _)| node)
            .map_err(|e| e.relative_to(self.root))
    }

    /// Depth first; `path` is the chain of targets that led here, for cycles.
    fn visit(
        &mut self,
        id: &TargetId,
        path: &mut Vec<TargetId>,
        done: &mut BTreeSet<TargetId>,
        graph: &mut Graph,
    ) -> Result<(), Error> {
        if done.contains(id) {
            return Ok(());
        }
        path.push(id.clone());
        let (node, spans) = self.node(id)?;
        for (input, span) in node.inputs.iter().zip(spans) {
            let Origin::Target(next) = &input.from else { continue };
            if let Some(at) = path.iter().position(|p| p == next) {
                let mut names: Vec<_> = path[at..].iter().map(ToString::to_string).collect();
                names.push(next.to_string());
                let recipe = &self.recipe(&id.recipe, None)?.0;
                return Err(recipe
                    .diagnostic(span, format!("`{next}` needs itself: {}", names.join(" → ")))
                    .help("take one of these inputs away")
                    .into());
            }
            self.visit(next, path, done, graph)?;
        }
        path.pop();
        done.insert(id.clone());
        graph.nodes.push(node);
        Ok(())
    }

    /// One target, with the span of each of its inputs.
    fn node(&mut self, id: &TargetId) -> Result<(Node, Vec<Span>), Error> {
        let registry = self.registry;
        let both = self.recipe(&id.recipe, None)?;
        let (recipe, lock) = &*both;
        let Some(table) = recipe.target(&id.target) else {
            return Err(self.no_target(id).into());
        };
        let Some((family, def)) = registry.step(&table.step.value) else {
            let names: Vec<&str> = registry.steps().map(|s| s.name).collect();
            let hint = nearest(&table.step.value, names.iter().copied());
            return Err(recipe
                .diagnostic(table.step.span.clone(), format!("no step `{}`", table.step.value))
                .help(match hint {
                    Some(name) => format!("did you mean `{name}`?"),
                    None => format!("the steps are {}", names.join(", ")),
                })
                .into());
        };
        let mut params = Map::new();
        let mut inputs = Vec::new();
        let mut spans = Vec::new();
        let keys = (def.keys)();
        for entry in &table.entries {
            let key = entry.key.value.as_str();
            if let Some(input) = def.inputs.iter().find(|i| i.name == key) {
                for (text, span) in texts(recipe, entry, input)? {
                    for text in self.variants(recipe, input, text, &span)? {
                        inputs.push(self.input(recipe, input, &text, span.clone())?);
                        spans.push(span.clone());
                    }
                }
            } else if keys.contains(&key) && key != LOCK {
                params.insert(key.into(), entry.value.value.clone());
            } else {
                let known = keys.iter().copied().filter(|k| *k != LOCK);
                let known: Vec<&str> = known.chain(def.inputs.iter().map(|i| i.name)).collect();
                return Err(recipe
                    .diagnostic(
                        entry.key.span.clone(),
                        format!("`{}` has no key `{key}`", def.name),
                    )
                    .help(match nearest(key, known.iter().copied()) {
                        Some(name) => format!("did you mean `{name}`?"),
                        None => format!("its keys are {}", known.join(", ")),
                    })
                    .into());
            }
        }
        for input in def.inputs {
            let given = inputs.iter().any(|i: &Input| i.name == input.name);
            if !given && input.arity == Arity::One {
                let kinds: Vec<_> = input.kinds.iter().map(|k| k.article()).collect();
                return Err(recipe
                    .diagnostic(
                        table.header.clone(),
                        format!("`{}` needs `{}`", id.target, input.name),
                    )
                    .help(format!("add `{} = \"…\"`: {}", input.name, kinds.join(" or ")))
                    .into());
            }
        }
        let kind = (def.output)(&params);
        let mut params = (def.resolve)(params).map_err(|error| {
            let span = recipe.span_of(&id.target, &error.path).unwrap_or(table.header.clone());
            let diagnostic = recipe.diagnostic(span, error.message);
            match error.hint {
                Some(hint) => diagnostic.help(hint),
                None => diagnostic,
            }
        })?;
        let mut unlocked = false;
        if def.locked {
            match lock.pin(&id.target, &params) {
                Some(pin) => params[LOCK] = pin,
                None => unlocked = true,
            }
        }
        let node = Node { id: id.clone(), family, def, kind, params, inputs, unlocked };
        Ok((node, spans))
    }

    /// What a string in an input field names: itself, or all that a matrix made of it where the
    /// input takes many.
    fn variants(
        &mut self,
        recipe: &Recipe,
        def: &InputDef,
        text: String,
        span: &Span,
    ) -> Result<Vec<String>, Error> {
        let InputRef::Target { recipe: other, target } = InputRef::parse(&text) else {
            return Ok(vec![text]);
        };
        let at = Some((recipe, span.clone()));
        let of = self.recipe(other.as_deref().unwrap_or(&recipe.name), at)?;
        let names: Vec<String> = of.0.variants(&target).map(|t| t.name.clone()).collect();
        if names.is_empty() {
            return Ok(vec![text]);
        }
        if def.arity != Arity::Many {
            let message =
                format!("`{target}` is {} targets, and `{}` takes one", names.len(), def.name);
            let help =
                format!("they are {}; a matrix over `{}` takes each", names.join(", "), def.name);
            return Err(recipe.diagnostic(span.clone(), message).help(help).into());
        }
        let full = |name| match &other {
            Some(recipe) => format!("{recipe}/{name}"),
            None => name,
        };
        Ok(names.into_iter().map(full).collect())
    }

    fn input(
        &mut self,
        recipe: &Recipe,
        def: &'static InputDef,
        text: &str,
        span: Span,
    ) -> Result<Input, Error> {
        let (label, kind, from) = match InputRef::parse(text) {
            InputRef::Path(relative) => {
                let folder = recipe.path.parent().unwrap_or(self.root);
                let path = clean(&folder.join(&relative));
                if std::fs::symlink_metadata(&path).is_err() {
                    return Err(recipe
                        .diagnostic(span, format!("no such file: {}", self.shown(&path)))
                        .help("paths are relative to the recipe's folder")
                        .into());
                }
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let shown = self.shown(&path);
                (name, Kind::Files, Origin::Path { path, shown })
            }
            InputRef::Target { recipe: other, target } => {
                let other = other.unwrap_or_else(|| recipe.name.clone());
                let id = TargetId::new(other, target);
                let at = Some((recipe, span.clone()));
                let registry = self.registry;
                let of = self.recipe(&id.recipe, at)?;
                let of = &of.0;
                let Some(table) = of.target(&id.target) else {
                    let names = of.targets.iter().map(|t| t.name.as_str());
                    let hint = nearest(&id.target, names);
                    return Err(recipe
                        .diagnostic(span, format!("no target `{}`", id.target))
                        .help(match hint {
                            Some(name) => format!("did you mean `{name}`?"),
                            None => "a file is written `./name`".into(),
                        })
                        .into());
                };
                // A wrong step name over there is that table's own mistake, found when it is visited.
                let step = registry.step(&table.step.value);
                if step.is_some_and(|(_, step)| step.acts) {
                    return Err(recipe
                        .diagnostic(
                            span,
                            format!("`{}` acts outside, and leaves nothing to take", id.target),
                        )
                        .into());
                }
                let raw = table.entries.iter();
                let raw = raw.map(|e| (e.key.value.clone(), e.value.value.clone())).collect();
                let kind = step.map_or(def.kinds[0], |(_, step)| (step.output)(&raw));
                (id.target.clone(), kind, Origin::Target(id))
            }
        };
        if !def.kinds.contains(&kind) {
            let wanted: Vec<_> = def.kinds.iter().map(|k| k.article()).collect();
            return Err(recipe
                .diagnostic(
                    span,
                    format!(
                        "`{}` takes {}, `{text}` is {}",
                        def.name,
                        wanted.join(" or "),
                        kind.article()
                    ),
                )
                .into());
        }
        let field = match def.arity {
            Arity::Many => format!("{}.{label}", def.name),
            _ => def.name.to_string(),
        };
        Ok(Input { name: def.name, field, label, kind, from })
    }

    /// A recipe by name; `from` is the place that names it.
    fn recipe(
        &mut self,
        name: &str,
        from: Option<(&Recipe, Span)>,
    ) -> Result<Rc<(Recipe, Lock)>, Error> {
        if !self.recipes.contains_key(name) {
            let path = self.root.join("recipes").join(format!("{name}.toml"));
            if !path.is_file() {
                let names = self.recipe_names();
                let message = format!("no recipe `{name}`: {} is not there", self.shown(&path));
                let hint = match nearest(name, names.iter().map(String::as_str)) {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("the recipes are {}", names.join(", ")),
                };
                return Err(match from {
                    Some((recipe, span)) => recipe.diagnostic(span, message).help(hint).into(),
                    None => step::Failure::input(message).hint(hint).into(),
                });
            }
            let recipe = Recipe::load(&path)?;
            let lock = Lock::load(&path.with_extension("lock"))?;
            self.recipes.insert(name.into(), Rc::new((recipe, lock)));
        }
        Ok(Rc::clone(&self.recipes[name]))
    }

    /// The target, or those that a matrix made of it.
    fn existing(&self, id: TargetId) -> Result<Vec<TargetId>, Error> {
        let recipe = &self.recipes[&id.recipe].0;
        if recipe.target(&id.target).is_some() {
            return Ok(vec![id]);
        }
        let variants = recipe.variants(&id.target);
        let variants: Vec<_> = variants.map(|t| TargetId::new(&id.recipe, &t.name)).collect();
        if variants.is_empty() { Err(self.no_target(&id).into()) } else { Ok(variants) }
    }

    fn no_target(&self, id: &TargetId) -> step::Failure {
        let (recipe, _) = &*self.recipes[&id.recipe];
        let names: Vec<&str> = recipe.targets.iter().map(|t| t.name.as_str()).collect();
        let shown = self.shown(&recipe.path);
        let message = format!("{shown} has no target `{}`", id.target);
        step::Failure::input(message).hint(match nearest(&id.target, names.iter().copied()) {
            Some(name) => format!("did you mean `{}/{name}`?", id.recipe),
            None => format!("its targets are {}", names.join(", ")),
        })
    }

    /// A path as people see it: relative to the workspace where it lies inside.
    fn shown(&self, path: &Path) -> String {
        path.strip_prefix(self.root).unwrap_or(path).display().to_string()
    }
}

/// The recipe that is meant where none is named.
pub const DEFAULT_RECIPE: &str = "demo";

/// The parameter that holds a locked source's pin. Not for recipes to write.
const LOCK: &str = "lock";

/// The strings of an input field, each with its place.
fn texts(
    recipe: &Recipe,
    entry: &recipe::Entry,
    def: &InputDef,
) -> Result<Vec<(String, Span)>, Diagnostic> {
    let wrong = |span: Span| {
        let expected = match def.arity {
            Arity::Many => "a list of targets or files",
            _ => "one target or file, as a string",
        };
        recipe.diagnostic(span, format!("`{}` takes {expected}", def.name))
    };
    match &entry.value.value {
        Value::String(text) => Ok(vec![(text.clone(), entry.value.span.clone())]),
        Value::Array(items) if def.arity == Arity::Many => items
            .iter()
            .enumerate()
            .map(|(i, item)| {
                let span = entry.span_of(&[&i.to_string()]);
                match item {
                    Value::String(text) => Ok((text.clone(), span)),
                    _ => Err(wrong(span)),
                }
            })
            .collect(),
        _ => Err(wrong(entry.value.span.clone())),
    }
}

/// Takes `.` and `..` out of a path by its text: the recipe's folder is a real one.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::CurDir => {}
            std::path::Component::ParentDir => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}
