//! `s3-test-server`: the server of the tests as a program, for tests that must not link it. Says where
//! it listens as one JSON line, and ends with its standard input.

use std::io::Read;

fn main() {
    let server = s3::testing::Server::start();
    let (id, secret) = (s3::testing::KEY_ID, s3::testing::SECRET);
    let endpoint = server.settings().endpoint.unwrap_or_default();
    println!("{{\"endpoint\": \"{endpoint}\", \"id\": \"{id}\", \"secret\": \"{secret}\"}}");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}
