//! A bill of materials in CycloneDX 1.6 (ECMA-424): models with their cards, data, the site, what they
//! hang on, and the libraries that made them.
//!
//! Knows nothing of what is in a model's files but its `config.json`.

use std::collections::BTreeMap;

use engine::Origin;
use serde_json::{Value, json};
use step::{BlobDigest, Kind};

use super::{HOME, Made};
use crate::display;

pub fn of(made: &[Made]) -> Value {
    let wanted: Vec<&Made> = made.iter().filter(|made| made.wanted).collect();
    let last = made.iter().map(|made| made.result.provenance.started).max().unwrap_or(0);
    let mut dependencies: Vec<Value> = made
        .iter()
        .map(|made| {
            let mut on: Vec<String> = made.inputs.iter().map(|input| name(&input.origin)).collect();
            on.sort();
            on.dedup();
            json!({"ref": made.id, "dependsOn": on})
        })
        .collect();
    let whole = json!({
        "type": "application",
        "bom-ref": "release",
        "name": wanted.iter().map(|made| made.id.to_string()).collect::<Vec<_>>().join(", "),
    });
    dependencies.push(json!({
        "ref": "release",
        "dependsOn": wanted.iter().map(|made| &made.id).collect::<Vec<_>>(),
    }));
    let mut bill = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": display::when(last),
            "tools": {"components": [{
                "type": "application",
                "name": "anneal",
                "version": env!("CARGO_PKG_VERSION"),
                "externalReferences": [{"type": "vcs", "url": HOME}],
            }]},
            "component": whole,
        },
        "components": components(made),
        "dependencies": dependencies,
    });
    bill["serialNumber"] = json!(serial_number(&bill));
    bill
}

fn components(made: &[Made]) -> Vec<Value> {
    let mut sources = BTreeMap::new();
    let mut libraries = BTreeMap::new();
    for made in made {
        for input in &made.inputs {
            if let Origin::Path { shown, .. } = &input.origin {
                sources.insert(shown.clone(), input.digest);
            }
        }
        for (name, version) in &made.result.provenance.versions {
            libraries.insert((name.clone(), version.clone()), ());
        }
    }
    let artifacts = made.iter().map(|one| artifact(one, made));
    let sources = sources.into_iter().map(|(path, digest)| {
        json!({
            "type": "data",
            "bom-ref": path,
            "name": path,
            "hashes": [{"alg": "BLAKE3", "content": digest}],
            "data": [{"type": "dataset", "name": path}],
        })
    });
    let libraries = libraries.into_keys().map(|(name, version)| {
        json!({
            "type": "library",
            "bom-ref": format!("library:{name}@{version}"),
            "name": name,
            "version": version,
        })
    });
    artifacts.chain(sources).chain(libraries).collect()
}

fn artifact(made: &Made, all: &[Made]) -> Value {
    let mut component = json!({
        "type": match made.kind {
            Kind::Model | Kind::Adapter | Kind::OnnxModel | Kind::GgufModel => {
                "machine-learning-model"
            }
            Kind::Site => "application",
            Kind::Dataset | Kind::Metrics | Kind::Tokenizer | Kind::Files => "data",
        },
        "bom-ref": made.id,
        "name": made.id,
        "version": made.result.output.short(),
        "hashes": [{"alg": "BLAKE3", "content": made.result.output}],
        "components": made.files.iter().map(|file| json!({
            "type": "file",
            "name": file.entry.path,
            "hashes": [
                {"alg": "SHA-256", "content": file.sha256},
                {"alg": "BLAKE3", "content": file.entry.digest},
            ],
            "properties": [{"name": "anneal:bytes", "value": file.entry.size.to_string()}],
        })).collect::<Vec<_>>(),
        "properties": [
            {"name": "anneal:step", "value": made.action.step},
            {"name": "anneal:action", "value": made.result.key},
            {"name": "anneal:bytes", "value": made.size().to_string()},
        ],
    });
    if let Some(licence) = &made.licence {
        let named = match ::release::licence::spdx(licence) {
            Some(id) => json!({"id": id}),
            None => json!({"name": licence}),
        };
        component["licenses"] = json!([{"license": named}]);
    }
    match component["type"].as_str() {
        Some("machine-learning-model") => component["modelCard"] = card(made, all),
        Some("data") => component["data"] = json!([{"type": "dataset", "name": made.id}]),
        _ => {}
    }
    component
}

/// What is known of a model: its architecture, the data that it has seen, its figures.
fn card(made: &Made, all: &[Made]) -> Value {
    let mut parameters = json!({"task": "text-generation", "architectureFamily": "transformer"});
    if let Some(architecture) = &made.architecture {
        parameters["modelArchitecture"] = json!(architecture);
    }
    let seen = datasets(made, all);
    if !seen.is_empty() {
        let seen: Vec<Value> = seen.into_iter().map(|id| json!({"ref": id})).collect();
        parameters["datasets"] = json!(seen);
    }
    let measured: Vec<Value> = figures(made, all)
        .into_iter()
        .map(|(name, value)| json!({"type": name, "value": value.to_string()}))
        .collect();
    let mut card = json!({"modelParameters": parameters});
    if !measured.is_empty() {
        card["quantitativeAnalysis"] = json!({"performanceMetrics": measured});
    }
    card
}

/// The datasets among all that a model was made from, in the order in which they were made.
fn datasets(made: &Made, all: &[Made]) -> Vec<String> {
    let mut from: Vec<&Made> = vec![made];
    let mut next = 0;
    while let Some(one) = from.get(next).copied() {
        for input in &one.inputs {
            let Origin::Target(id) = &input.origin else { continue };
            let found = all.iter().find(|made| made.id == *id);
            from.extend(found.filter(|found| from.iter().all(|known| known.id != found.id)));
        }
        next += 1;
    }
    let seen = |made: &&Made| made.kind == Kind::Dataset && from.iter().any(|f| f.id == made.id);
    all.iter().filter(seen).map(|made| made.id.to_string()).collect()
}

/// A model's own figures, and those that evaluations have of it.
fn figures(made: &Made, all: &[Made]) -> BTreeMap<String, f64> {
    let mut figures = made.result.metrics.clone();
    for evaluation in all.iter().filter(|made| made.kind == Kind::Metrics) {
        for input in &evaluation.inputs {
            let Origin::Target(id) = &input.origin else { continue };
            let Some((_, label)) = input.field.split_once('.') else { continue };
            if *id != made.id {
                continue;
            }
            for (name, value) in &evaluation.result.metrics {
                if let Some(figure) = name.strip_prefix(label).and_then(|n| n.strip_prefix('.')) {
                    figures.insert(format!("{}: {figure}", evaluation.id), *value);
                }
            }
        }
    }
    figures
}

fn name(origin: &Origin) -> String {
    match origin {
        Origin::Target(id) => id.to_string(),
        Origin::Path { shown, .. } => shown.clone(),
    }
}

/// A UUID of version 8 (RFC 9562) from what the bill says: the same release has the same.
fn serial_number(bill: &Value) -> String {
    let digest = BlobDigest::of(bill.to_string().as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_bytes()[..16]);
    bytes[6] = 0x80 | bytes[6] & 0x0f;
    bytes[8] = 0x80 | bytes[8] & 0x3f;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let parts = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]];
    format!("urn:uuid:{}", parts.join("-"))
}
