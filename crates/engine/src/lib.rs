//! Plan, action keys, code digests, execution, provenance, why. Emits events; prints nothing.
