//! Where tensors begin in the external data of an ONNX graph. Only the graph beside it says so.
//!
//! Knows nothing of what is computed: of each message it reads the way to the offsets. Tags:
//! onnx/onnx.proto of ONNX 1.17.

use std::collections::BTreeMap;

use prost::Message;

#[derive(Message)]
struct Model {
    #[prost(message, optional, tag = "7")]
    graph: Option<Graph>,
}

#[derive(Message)]
struct Graph {
    #[prost(message, repeated, tag = "5")]
    initializer: Vec<Tensor>,
}

#[derive(Message)]
struct Tensor {
    /// `location`, `offset`, `length`.
    #[prost(message, repeated, tag = "13")]
    external_data: Vec<Entry>,
}

#[derive(Message)]
struct Entry {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// The files that a graph has its tensors in, by their names beside it, and the tensors' offsets.
/// None if it is no graph.
pub fn external_data(graph: &[u8]) -> Option<BTreeMap<String, Vec<u64>>> {
    let mut files = BTreeMap::<String, Vec<u64>>::new();
    for tensor in Model::decode(graph).ok()?.graph?.initializer {
        let said = |key: &str| tensor.external_data.iter().find(|e| e.key == key).map(|e| &e.value);
        let Some(location) = said("location") else { continue };
        // Without one it begins where the file does.
        let offset = said("offset").map_or(Some(0), |offset| offset.parse().ok());
        files.entry(location.clone()).or_default().extend(offset);
    }
    Some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the onnx package writes it.
    const GRAPH: &[u8] = include_bytes!("golden/graph.onnx");

    #[test]
    fn tensors_begin_where_the_graph_says() {
        let files = external_data(GRAPH).unwrap();
        let expected = [("graph.onnx_data", vec![0, 4000, 16000]), ("graph.onnx_data_1", vec![0])];
        assert_eq!(files, expected.map(|(name, tensors)| (name.to_string(), tensors)).into());
    }

    #[test]
    fn half_a_graph_says_nothing() {
        assert_eq!(external_data(&GRAPH[..GRAPH.len() / 2]), None);
        assert_eq!(external_data(b"GGUF\x03\0\0\0"), None);
        assert_eq!(external_data(b""), None);
    }
}
