//! An in-toto statement for each action: which files it gave, from which inputs, by which code, when
//! and where. Predicate: SLSA provenance 1.0 (slsa.dev/spec/v1.0/provenance).
//!
//! Knows nothing of signatures: whoever publishes signs the lines as they are.

use engine::Origin;
use serde_json::{Value, json};

use super::{HOME, Made};
use crate::display;

/// One statement a line, inputs before what uses them.
pub fn statements(made: &[Made]) -> String {
    made.iter().map(|made| format!("{}\n", statement(made))).collect()
}

fn statement(made: &Made) -> Value {
    let action = &made.action;
    let provenance = &made.result.provenance;
    let files = made.files.iter().map(|file| {
        json!({
            "name": format!("{}/{}", made.id, file.entry.path),
            "digest": {"sha256": file.sha256, "blake3": file.entry.digest},
        })
    });
    // The artifact as a whole: the digest of the list of its files.
    let whole = json!({"name": made.id, "digest": {"blake3": made.result.output}});
    let subject: Vec<Value> = std::iter::once(whole).chain(files).collect();

    let mut materials: Vec<Value> = made
        .inputs
        .iter()
        .map(|input| {
            let (kind, name) = match &input.origin {
                Origin::Target(id) => ("target", id.to_string()),
                Origin::Path { shown, .. } => ("path", shown.clone()),
            };
            json!({
                "name": input.field,
                "digest": {"blake3": input.digest},
                "annotations": {kind: name},
            })
        })
        .collect();
    if let Some(commit) = &provenance.git_commit {
        materials.push(json!({
            "name": "workspace",
            "digest": {"gitCommit": commit},
            "annotations": {"dirty": provenance.git_dirty},
        }));
    }
    let ended = provenance.started + provenance.wall_seconds.ceil() as u64;
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subject,
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": format!("{HOME}/blob/main/ARCHITECTURE.md#what-a-key-is-made-of"),
                "externalParameters": {
                    "target": made.id,
                    "step": action.step,
                    "params": action.params,
                },
                "internalParameters": {
                    "code": action.code,
                    "tools": action.tools,
                    "platform": action.platform,
                    "vouchedFrom": provenance.vouched_from,
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {
                    "id": HOME,
                    "version": versions(made),
                },
                "metadata": {
                    "invocationId": made.result.key,
                    "startedOn": display::when(provenance.started),
                    "finishedOn": display::when(ended),
                },
                "byproducts": [
                    {"name": "log", "digest": {"blake3": made.result.log}},
                    {"name": "report", "digest": {"blake3": made.result.report}},
                ],
            },
        },
    })
}

/// What the step ran on and with.
fn versions(made: &Made) -> Value {
    let provenance = &made.result.provenance;
    let mut versions = provenance.versions.clone();
    versions.insert("host".into(), provenance.host.clone());
    versions.insert("device".into(), provenance.device.clone());
    json!(versions)
}
