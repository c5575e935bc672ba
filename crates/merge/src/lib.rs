//! Steps that fold adapters into their base.
