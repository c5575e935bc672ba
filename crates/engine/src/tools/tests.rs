//! The table of tools, and unpacking: all but the network.

use std::io::Write;

use super::*;

#[test]
fn every_wheel_is_pinned_by_version_and_hash() {
    for tool in &TOOLS {
        let Source::Pip(wheels) = &tool.source else { continue };
        assert!(wheels.pins.lines().count() > 0, "{}", tool.name);
        for line in wheels.pins.lines() {
            let (pin, hash) = line.split_once(" --hash=sha256:").expect(line);
            let (_, version) = pin.split_once("==").expect(line);
            assert!(version.chars().all(|c| c.is_ascii_digit() || c == '.'), "{line}");
            let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
            assert!(hash.len() == 64 && hash.chars().all(is_hex), "{line}");
        }
    }
}

#[test]
fn every_proof_is_among_what_is_kept() {
    for tool in &TOOLS {
        let Source::Pip(wheels) = &tool.source else { continue };
        assert!(wheels.keep.iter().any(|(_, to)| *to == tool.proof), "{}", tool.name);
    }
}

#[test]
fn the_key_follows_the_pins() {
    let root = Path::new("/nowhere");
    for (name, version) in [("libtorch", "2.11.0"), ("onnxruntime", "1.30.0")] {
        let tool = find(name).unwrap();
        let (found, hash) = tool.pinned(root).unwrap();
        assert_eq!((found.as_str(), hash.len()), (version, 16));
        let place = tool.place(root, Path::new("/tools")).unwrap();
        assert!(place.starts_with("/tools"));
        let folder = place.file_name().unwrap().to_str().unwrap();
        assert!(folder.starts_with(&format!("{name}-{version}-")), "{folder}");
    }
    let unknown = version_and_hash("libtroch", root).unwrap_err();
    assert!(unknown.message.contains("libtroch"), "{unknown}");
}

#[test]
fn only_what_is_kept_leaves_a_wheel() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = dir.path().join("x.whl");
    let mut zip = zip::ZipWriter::new(File::create(&wheel).unwrap());
    let plain = zip::write::SimpleFileOptions::default();
    for (name, options) in [
        ("pkg/bin/tool", plain.unix_permissions(0o755)),
        ("pkg/include/a/b.h", plain),
        ("pkg/lib.so", plain),
        ("pkg/lib.so.1", plain),
        ("pkg/other", plain),
        ("pkg/include/../../../evil", plain),
    ] {
        zip.start_file(name, options).unwrap();
        zip.write_all(name.as_bytes()).unwrap();
    }
    zip.finish().unwrap();
    let out = dir.path().join("out");
    let keep = [("pkg/bin/", "bin/"), ("pkg/include/", "include/"), ("pkg/lib.so", "lib/x.so")];
    wheel::unpack(&wheel, &keep, &out).unwrap();
    let mut files = Vec::new();
    let mut open = vec![out.clone()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            match entry.path() {
                path if path.is_dir() => open.push(path),
                path => files.push(path.strip_prefix(&out).unwrap().display().to_string()),
            }
        }
    }
    files.sort();
    assert_eq!(files, ["bin/tool", "include/a/b.h", "lib/x.so"]);
    use std::os::unix::fs::PermissionsExt;
    let mode = |name: &str| std::fs::metadata(out.join(name)).unwrap().permissions().mode();
    assert_eq!(mode("bin/tool") & 0o111, 0o111);
    assert_eq!(mode("lib/x.so") & 0o111, 0);
    assert!(!dir.path().join("evil").exists());
}

#[test]
fn a_truncated_wheel_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let wheel = dir.path().join("x.whl");
    std::fs::write(&wheel, b"PK\x03\x04").unwrap();
    let error = wheel::unpack(&wheel, &[], dir.path()).unwrap_err();
    assert!(error.message.contains("x.whl"), "{error}");
}

#[test]
fn development_packages_do_not_move_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let site = dir.path().join("site");
    std::fs::create_dir(&site).unwrap();
    let pins = |dev: &str, transformers: &str| {
        let lock = serde_json::json!({
            "lockfileVersion": 3,
            "packages": {
                "": {"name": "site"},
                "node_modules/@huggingface/transformers": {"version": transformers, "integrity": "sha512-x"},
                "node_modules/playwright-core": {"version": dev, "integrity": "sha512-y", "dev": true},
            }
        });
        std::fs::write(site.join("package-lock.json"), lock.to_string()).unwrap();
        npm::pins(dir.path()).unwrap()
    };
    assert_eq!(pins("1.0.0", "4.3.1").0, "4.3.1");
    assert_eq!(pins("1.0.0", "4.3.1"), pins("1.0.1", "4.3.1"));
    assert_ne!(pins("1.0.0", "4.3.1"), pins("1.0.0", "4.3.2"));
    std::fs::write(site.join("package-lock.json"), "{}").unwrap();
    assert!(npm::pins(dir.path()).unwrap_err().hint.is_some());
}

#[test]
fn a_library_of_ones_own_is_told_apart_by_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let main = dir.path().join("lib.so");
    let own = |content: &[u8]| {
        std::fs::write(&main, content).unwrap();
        let paths = with_env(dir.path(), []);
        fingerprint(&Own { paths, main: main.clone(), origin: "LIB=x".into() })
    };
    assert_eq!(own(b"a").unwrap(), own(b"a").unwrap());
    assert_ne!(own(b"a").unwrap(), own(b"b").unwrap());
    assert_ne!(own(&[0; 10]).unwrap(), own(&[0; 11]).unwrap());
    let gone = Own {
        paths: with_env(dir.path(), []),
        main: dir.path().join("gone.so"),
        origin: "LIBTORCH=/gone".into(),
    };
    let error = fingerprint(&gone).unwrap_err();
    assert!(error.message.starts_with("LIBTORCH=/gone"), "{error}");
}
