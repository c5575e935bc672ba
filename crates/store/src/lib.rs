//! Cas and ActionCache on local disk: atomic, verified, read-only blobs.
