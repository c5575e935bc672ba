//! Against a real server: what is written comes back, conditions hold, and no fault on the way makes
//! a wrong byte.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use s3::testing::{Fault, Proxy, Server};
use s3::{Bucket, Bytes, Condition, Location, Object, Put, Settings, Written};

fn bytes(size: usize, seed: u64) -> Vec<u8> {
    let mut chance = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; size];
    chance.fill(&mut bytes);
    bytes
}

fn file(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join("file");
    std::fs::write(&path, bytes).unwrap();
    path
}

async fn read(bucket: &Bucket, name: &str) -> Option<(Object, Bytes)> {
    bucket.get(name, 1 << 30).await.unwrap()
}

#[tokio::test]
async fn what_is_written_comes_back_with_its_headers() {
    let server = Server::start();
    let bucket = server.bucket("some/where");
    let put = Put {
        content_type: Some("text/css".into()),
        content_encoding: Some("br".into()),
        cache_control: Some("no-cache".into()),
        metadata: [("blake3".to_string(), "abc".to_string())].into(),
        sha256: true,
        ..Put::default()
    };
    let Written::Now(etag) = bucket.put("a b/é.css", "text".into(), &put).await.unwrap() else {
        panic!("no condition was set")
    };
    let head = bucket.head("a b/é.css").await.unwrap().unwrap();
    assert_eq!((head.size, &head.etag), (4, &etag));
    assert_eq!(head.content_type, put.content_type);
    assert_eq!(head.content_encoding, put.content_encoding);
    assert_eq!(head.cache_control, put.cache_control);
    assert_eq!(head.metadata, put.metadata);
    let digest = <sha2::Sha256 as sha2::Digest>::digest(b"text");
    assert_eq!(head.sha256, Some(digest.into()));
    let (object, text) = read(&bucket, "a b/é.css").await.unwrap();
    assert_eq!((object.size, &*text), (4, &b"text"[..]));
    assert!(bucket.get("a b/é.css", 3).await.unwrap_err().message.contains("larger"));

    let mut names = Vec::new();
    bucket.list("a b/", |listed| names.push((listed.name, listed.size))).await.unwrap();
    assert_eq!(names, [("a b/é.css".to_string(), 4)]);
    bucket.delete("a b/é.css").await.unwrap();
    bucket.delete("a b/é.css").await.unwrap();
    assert_eq!(bucket.head("a b/é.css").await.unwrap(), None);
    assert_eq!(read(&bucket, "a b/é.css").await, None);
}

#[tokio::test]
async fn the_first_write_wins_and_a_pointer_moves_once() {
    let server = Server::start();
    let bucket = server.bucket("");
    assert!(bucket.is_conditional("probe").await.unwrap());
    assert_eq!(server.names(), [""; 0]);
    let ignores = Server::unconditional();
    assert!(!ignores.bucket("").is_conditional("probe").await.unwrap());

    let new = Put::when(Condition::New);
    let writers = (0..16).map(|i| {
        let (bucket, new) = (bucket.clone(), new.clone());
        tokio::spawn(async move { bucket.put("x", vec![i; 100].into(), &new).await.unwrap() })
    });
    let mut won = 0;
    for writer in writers.collect::<Vec<_>>() {
        won += usize::from(writer.await.unwrap().is_now());
    }
    assert_eq!(won, 1);

    let before = bucket.head("x").await.unwrap().unwrap().etag;
    let still = Put::when(Condition::Still(before));
    assert!(bucket.put("x", "new".into(), &still).await.unwrap().is_now());
    assert_eq!(bucket.put("x", "newer".into(), &still).await.unwrap(), Written::Refused);
    assert_eq!(bucket.put("y", "none".into(), &still).await.unwrap(), Written::Refused);
    assert_eq!(&*read(&bucket, "x").await.unwrap().1, b"new");
}

#[tokio::test]
async fn a_large_file_goes_in_parts_and_comes_in_ranges() {
    let server = Server::start();
    let bucket = server.bucket("p");
    let dir = tempfile::tempdir().unwrap();
    let all = bytes((33 << 20) + 5, 1);
    let path = file(&dir, &all);
    let sent = AtomicU64::new(0);
    let count = |bytes| _ = sent.fetch_add(bytes, Ordering::Relaxed);
    let new = Put::when(Condition::New);
    assert!(bucket.put_file("large", &path, &new, &count).await.unwrap().is_now());
    assert_eq!(sent.into_inner(), all.len() as u64);
    assert_eq!(bucket.put_file("large", &path, &new, &|_| {}).await.unwrap(), Written::Refused);
    assert!(read(&bucket, "large").await.unwrap().1 == all, "other bytes");
    let mut part = Vec::new();
    let range = 20 << 20..(20 << 20) + 1000;
    let object = bucket.fetch("large", Some(range.clone()), |piece: &[u8]| {
        part.extend_from_slice(piece);
        Ok(())
    });
    assert_eq!(object.await.unwrap().unwrap().size, all.len() as u64);
    assert_eq!(part, all[range.start as usize..range.end as usize]);
}

/// Objects and large files, there and back, through 120 faults of every kind that can be told from
/// what was meant. (A flipped answer cannot, without a digest: who reads holds it to one.)
#[tokio::test]
async fn what_passes_is_tried_again() {
    let kinds: Vec<Fault> =
        Fault::ALL.into_iter().filter(|kind| *kind != Fault::FlippedAnswer).collect();
    let server = Server::start();
    let proxy = Proxy::start(&server, 7, &kinds, 3, 120);
    let bucket = proxy.bucket("p");
    let dir = tempfile::tempdir().unwrap();
    let large = bytes(17 << 20, 2);
    let path = file(&dir, &large);
    let mut round = 0;
    while proxy.left() > 0 {
        let small = bytes(1000 + round, round as u64);
        let name = format!("small-{round}");
        let put = Put { sha256: true, ..Put::default() };
        assert!(bucket.put(&name, small.clone().into(), &put).await.unwrap().is_now());
        assert_eq!(*read(&bucket, &name).await.unwrap().1, *small);
        let mut listed = 0;
        bucket.list("small-", |_| listed += 1).await.unwrap();
        assert_eq!(listed, round + 1);
        if round % 15 == 0 {
            let name = format!("large-{round}");
            bucket.put_file(&name, &path, &Put::default(), &|_| {}).await.unwrap();
            assert!(read(&bucket, &name).await.unwrap().1 == large, "other bytes");
        }
        round += 1;
    }
}

#[tokio::test]
async fn what_does_not_pass_is_told() {
    let server = Server::start();
    let location: Location = "s3://bucket/p".parse().unwrap();
    let wrong = Bucket::with_keys(&location, &server.settings(), "AKIDEXAMPLE", "guess");
    let failure = wrong.put("x", "y".into(), &Put::default()).await.unwrap_err();
    assert!(failure.message.contains("s3://bucket/p/x"), "{failure}");
    assert!(failure.message.contains("403"), "{failure}");
    assert!(failure.hint.unwrap().contains("credentials"));

    let elsewhere: Location = "s3://nowhere/p".parse().unwrap();
    let nowhere =
        Bucket::with_keys(&elsewhere, &server.settings(), s3::testing::KEY_ID, s3::testing::SECRET);
    let failure = nowhere.list("", |_| {}).await.unwrap_err();
    assert!(failure.message.contains("there is no such bucket"), "{failure}");

    let down = Settings { endpoint: Some("http://127.0.0.1:9".into()), ..server.settings() };
    let down = Bucket::with_keys(&location, &down, "a", "b");
    let failure = down.get("x", 10).await.unwrap_err();
    assert!(failure.message.contains("refused"), "{failure}");
    assert!(failure.hint.unwrap().contains("network"));
}

/// An object that another one takes the place of while it is read is not half of each.
#[tokio::test]
async fn an_object_that_changes_on_the_way_is_no_object() {
    let server = Server::start();
    let proxy = Proxy::start(&server, 3, &[Fault::Truncated], 1, 1);
    let direct = server.bucket("");
    direct.put("x", vec![1; 1 << 20].into(), &Put::default()).await.unwrap();
    let settings = server.settings();
    let changed = Mutex::new(false);
    let bucket = proxy.bucket("");
    let failure = bucket.fetch("x", None, |_| {
        let mut changed = changed.lock().unwrap();
        if !*changed {
            *changed = true;
            let settings = settings.clone();
            // In a runtime of its own: this one is busy with us.
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let location: Location = "s3://bucket".parse().unwrap();
                let (id, secret) = (s3::testing::KEY_ID, s3::testing::SECRET);
                let other = Bucket::with_keys(&location, &settings, id, secret);
                let put = Put::default();
                let put = other.put("x", vec![2; 1 << 20].into(), &put);
                runtime.unwrap().block_on(put).unwrap();
            })
            .join()
            .unwrap();
        }
        Ok(())
    });
    let failure = failure.await.unwrap_err();
    assert!(failure.message.contains("changed in between"), "{failure}");
}
