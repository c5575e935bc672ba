"""The documents of a release in their own readers: CycloneDX's validator, in-toto's statements.

Takes the folder that `cargo xtask release` wrote.
"""

import hashlib
import json
import sys
from pathlib import Path

import in_toto_attestation.v1.statement_pb2 as in_toto
from cyclonedx.model.bom import Bom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2 as slsa
from in_toto_attestation.v1.statement import Statement

folder, artifacts = Path(sys.argv[1]), Path(sys.argv[2])

text = (folder / "bom.cdx.json").read_text()
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
assert wrong is None, wrong
bom = Bom.from_json(json.loads(text))
# What hangs on what: every name must be that of a component.
bom.validate()
models = [c for c in bom.components if c.type == "machine-learning-model"]
print(f"ok      CycloneDX: {len(bom.components)} components, {len(models)} models with their cards")
assert models

statements = 0
made = {}
for line in (folder / "provenance.intoto.jsonl").read_text().splitlines():
    statement = json_format.Parse(line, in_toto.Statement())
    Statement.copy_from_pb(statement).validate()
    predicate = json.loads(line)["predicate"]
    json_format.ParseDict(predicate, slsa.Provenance())
    # The chain holds: what a step took is what an earlier one gave.
    for material in predicate["buildDefinition"]["resolvedDependencies"]:
        target = material["annotations"].get("target")
        assert target is None or made[target] == material["digest"]["blake3"], material
    made[statement.subject[0].name] = statement.subject[0].digest["blake3"]
    for subject in statement.subject[1:]:
        recipe, rest = subject.name.split("/", 1)
        content = (artifacts / recipe / rest).read_bytes()
        assert hashlib.sha256(content).hexdigest() == subject.digest["sha256"], subject.name
    statements += 1
print(f"ok      in-toto: {statements} statements, each file with its digest, each input made before")
assert statements
