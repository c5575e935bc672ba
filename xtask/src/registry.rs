//! The steps that Anneal has: one line a family.

use engine::Registry;

pub const REGISTRY: Registry = Registry {
    families: &[
        &source::FAMILY,
        &dataset::FAMILY,
        &train::FAMILY,
        &adapter::FAMILY,
        &merge::FAMILY,
        &onnx::FAMILY,
        &gguf::FAMILY,
        &eval::FAMILY,
        &site::FAMILY,
        &command::FAMILY,
        &publish::FAMILY,
    ],
};
