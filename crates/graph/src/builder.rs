//! A graph that grows node by node while its weights are written to external data.
//!
//! Knows nothing of architectures.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use prost::Message;

use crate::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto, data_type,
};
use crate::{Error, Options};

/// Offsets in external data are multiples of this.
const ALIGNMENT: u64 = 64;

pub struct Builder {
    path: PathBuf,
    graph: GraphProto,
    chunk: u64,
    /// The open file of external data, how many bytes it has, and how many came before it.
    data: Option<BufWriter<File>>,
    offset: u64,
    chunks: usize,
    /// Bytes of the last tensor that are still to come.
    missing: u64,
}

/// One dimension of an input or output.
pub enum Dim {
    Size(usize),
    /// Known at run time.
    Named(&'static str),
}

/// An attribute of a node.
pub enum Attr {
    Int(i64),
    Float(f32),
    Text(&'static str),
}

/// Where a tensor lies, so that another initializer may lie there too.
#[derive(Clone)]
pub struct Place {
    location: String,
    offset: u64,
    length: u64,
}

impl Builder {
    /// The graph will be written to `to/model{suffix}.onnx`.
    pub fn new(to: &Path, options: Options) -> Self {
        let path = to.join(format!("model{}.onnx", options.dtype.suffix()));
        Self {
            path,
            graph: GraphProto { name: Some("model".into()), ..GraphProto::default() },
            chunk: options.chunk,
            data: None,
            offset: 0,
            chunks: 0,
            missing: 0,
        }
    }

    pub fn input(&mut self, name: &str, elem_type: i32, shape: &[Dim]) {
        self.graph.input.push(value(name, elem_type, shape));
    }

    pub fn output(&mut self, name: &str, elem_type: i32, shape: &[Dim]) {
        self.graph.output.push(value(name, elem_type, shape));
    }

    /// A node of ONNX itself. Its first output has the node's own name.
    pub fn node(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[&str],
        attrs: &[(&str, Attr)],
    ) -> String {
        self.add("", op, name, inputs, &[name], attrs);
        name.into()
    }

    /// A node of ONNX itself with several outputs.
    pub fn split(&mut self, name: &str, x: &str, sizes: &str, outputs: &[&str]) {
        self.add("", "Split", name, &[x, sizes], outputs, &[("axis", Attr::Int(-1))]);
    }

    /// A node of ONNX Runtime's own operators (`com.microsoft`), with its outputs.
    pub fn contrib(
        &mut self,
        op: &str,
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        attrs: &[(&str, Attr)],
    ) {
        self.add("com.microsoft", op, name, inputs, outputs, attrs);
    }

    fn add(
        &mut self,
        domain: &str,
        op: &str,
        name: &str,
        inputs: &[&str],
        outputs: &[&str],
        attrs: &[(&str, Attr)],
    ) {
        let strings = |all: &[&str]| all.iter().map(|s| s.to_string()).collect();
        let attribute = attrs
            .iter()
            .map(|(name, attr)| {
                let name = Some(name.to_string());
                let empty = AttributeProto { name, ..AttributeProto::default() };
                match attr {
                    Attr::Float(f) => AttributeProto { f: Some(*f), r#type: Some(1), ..empty },
                    Attr::Int(i) => AttributeProto { i: Some(*i), r#type: Some(2), ..empty },
                    Attr::Text(s) => {
                        AttributeProto { s: Some((*s).into()), r#type: Some(3), ..empty }
                    }
                }
            })
            .collect();
        self.graph.node.push(NodeProto {
            input: strings(inputs),
            output: strings(outputs),
            name: Some(name.into()),
            op_type: Some(op.into()),
            attribute,
            domain: (!domain.is_empty()).then(|| domain.into()),
        });
    }

    /// A few integers that are part of the graph itself.
    pub fn integers(&mut self, name: &str, dims: &[usize], values: &[i64]) -> String {
        self.inline(name, data_type::INT64, dims, values.iter().flat_map(|v| v.to_le_bytes()))
    }

    /// A number that is part of the graph itself.
    pub fn float(&mut self, name: &str, value: f32) -> String {
        self.inline(name, data_type::FLOAT, &[], value.to_le_bytes())
    }

    fn inline(
        &mut self,
        name: &str,
        data_type: i32,
        dims: &[usize],
        bytes: impl IntoIterator<Item = u8>,
    ) -> String {
        self.graph.initializer.push(TensorProto {
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(data_type),
            name: Some(name.into()),
            raw_data: Some(bytes.into_iter().collect()),
            external_data: Vec::new(),
            data_location: None,
        });
        name.into()
    }

    /// A tensor in external data: row-major, little-endian.
    pub fn tensor(
        &mut self,
        name: &str,
        data_type: i32,
        dims: &[usize],
        bytes: &[u8],
    ) -> Result<Place, Error> {
        let place = self.begin(name, data_type, dims, bytes.len() as u64)?;
        self.append(bytes)?;
        Ok(place)
    }

    /// A tensor in external data whose `length` bytes come by [`Builder::append`].
    pub fn begin(
        &mut self,
        name: &str,
        data_type: i32,
        dims: &[usize],
        length: u64,
    ) -> Result<Place, Error> {
        debug_assert_eq!(self.missing, 0, "the tensor before {name} is whole");
        if self.data.is_none() || (self.offset > 0 && self.offset + length > self.chunk) {
            self.next_chunk()?;
        }
        let padding = self.offset.next_multiple_of(ALIGNMENT) - self.offset;
        self.missing = padding;
        self.append(&[0; ALIGNMENT as usize][..padding as usize])?;
        let location = data_name(&self.path, self.chunks - 1);
        let place = Place { location, offset: self.offset, length };
        self.missing = length;
        self.tensor_at(name, data_type, dims, &place);
        Ok(place)
    }

    /// The next bytes of the tensor that was begun.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        debug_assert!(bytes.len() as u64 <= self.missing, "more bytes than were announced");
        let data = self.data.as_mut().expect("a tensor was begun");
        data.write_all(bytes).map_err(|e| {
            Error::write(&self.path.with_file_name(data_name(&self.path, self.chunks - 1)), e)
        })?;
        self.offset += bytes.len() as u64;
        self.missing -= bytes.len() as u64;
        Ok(())
    }

    /// Another tensor over bytes that are there already.
    pub fn tensor_at(&mut self, name: &str, data_type: i32, dims: &[usize], place: &Place) {
        let entry = |key: &str, value: String| StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value),
        };
        self.graph.initializer.push(TensorProto {
            dims: dims.iter().map(|&d| d as i64).collect(),
            data_type: Some(data_type),
            name: Some(name.into()),
            raw_data: None,
            external_data: vec![
                entry("location", place.location.clone()),
                entry("offset", place.offset.to_string()),
                entry("length", place.length.to_string()),
            ],
            data_location: Some(1),
        });
    }

    fn next_chunk(&mut self) -> Result<(), Error> {
        self.close_chunk()?;
        let path = self.path.with_file_name(data_name(&self.path, self.chunks));
        let file = File::create(&path).map_err(|e| Error::write(&path, e))?;
        // Whatever is larger goes by.
        self.data = Some(BufWriter::with_capacity(1 << 16, file));
        self.offset = 0;
        self.chunks += 1;
        Ok(())
    }

    fn close_chunk(&mut self) -> Result<(), Error> {
        match self.data.take() {
            Some(mut data) => data.flush().map_err(|e| Error::write(&self.path, e)),
            None => Ok(()),
        }
    }

    /// Writes the graph, and gives its path and how many files of data it has.
    pub fn finish(mut self) -> Result<(PathBuf, usize), Error> {
        self.close_chunk()?;
        let opset = |domain: &str, version| OperatorSetIdProto {
            domain: Some(domain.into()),
            version: Some(version),
        };
        let model = ModelProto {
            ir_version: Some(10),
            producer_name: Some("anneal".into()),
            graph: Some(self.graph),
            opset_import: vec![opset("", 22), opset("com.microsoft", 1)],
        };
        std::fs::write(&self.path, model.encode_to_vec())
            .map_err(|e| Error::write(&self.path, e))?;
        Ok((self.path, self.chunks))
    }
}

/// `model_q4.onnx_data`, `model_q4.onnx_data_1` …, as Transformers.js looks for them.
fn data_name(graph: &Path, chunk: usize) -> String {
    let name = graph.file_name().expect("a graph has a name").to_string_lossy();
    match chunk {
        0 => format!("{name}_data"),
        n => format!("{name}_data_{n}"),
    }
}

fn value(name: &str, elem_type: i32, shape: &[Dim]) -> ValueInfoProto {
    let dim = shape
        .iter()
        .map(|dim| match dim {
            Dim::Size(n) => DimensionProto { dim_value: Some(*n as i64), dim_param: None },
            Dim::Named(name) => DimensionProto { dim_value: None, dim_param: Some((*name).into()) },
        })
        .collect();
    let tensor_type =
        TensorTypeProto { elem_type: Some(elem_type), shape: Some(TensorShapeProto { dim }) };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { tensor_type: Some(tensor_type) }),
    }
}
