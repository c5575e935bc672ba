//! Canonical JSON: the one encoding that is ever hashed.
//!
//! Keys sorted by their bytes, no white space, numbers as serde_json prints them (shortest form
//! that reads back the same). Does not depend on the order in which a map was filled, nor on
//! whether some dependency switched serde_json to insertion order.

use serde::Serialize;
use serde_json::Value;

/// The canonical bytes of `value`.
///
/// # Panics
/// If `value` holds a map whose keys are not strings: a bug in the type, not in the data.
pub fn to_vec(value: &impl Serialize) -> Vec<u8> {
    let value = serde_json::to_value(value).expect("types that are hashed serialise to JSON");
    let mut out = Vec::new();
    write(&value, &mut out);
    out
}

fn write(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort_unstable();
            out.push(b'{');
            for (i, key) in keys.into_iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                out.extend(serde_json::to_vec(key).expect("a string is JSON"));
                out.push(b':');
                write(&map[key], out);
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                write(item, out);
            }
            out.push(b']');
        }
        scalar => out.extend(serde_json::to_vec(scalar).expect("a scalar is JSON")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_sorted_at_every_depth() {
        let value: Value = serde_json::from_str(r#"{"b":[{"z":1,"a":0.1}],"a":null}"#).unwrap();
        assert_eq!(to_vec(&value), br#"{"a":null,"b":[{"a":0.1,"z":1}]}"#);
    }
}
