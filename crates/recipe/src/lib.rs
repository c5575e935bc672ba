//! TOML text to Recipe, with source spans for errors. Knows no step kind.
