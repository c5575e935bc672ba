//! The worker against an S3 server in this process: what it writes and in which order, killed at each
//! request, beside another publisher; and its check of what a visitor gets.

mod world;

use std::collections::BTreeMap;
use std::fs;

use serde_json::json;

use world::{Front, Spy, World, site};

#[test]
fn a_site_goes_out_with_its_headers_and_passes_the_check() {
    let world = World::new();
    let first = site(&[("models/a", "weights"), ("assets/main.1f.js", "export {}")]);
    let told = world.publish(&first).unwrap();
    assert_eq!(told["before"], json!(null));
    assert_eq!(told["moved"], json!(["index.html", "isolate.js"]));
    assert_eq!(world.visible(), world::release_of(&first));

    let object = world.head("assets/main.1f.js");
    assert_eq!(object.content_type.as_deref(), Some("text/javascript; charset=utf-8"));
    assert_eq!(object.cache_control.as_deref(), Some("public, max-age=31536000, immutable"));
    let page = world.head("index.html");
    assert_eq!(page.cache_control.as_deref(), Some("no-cache"));

    let front = Front::start(world.bucket(), None);
    let told = world.check(&front.url()).unwrap();
    assert_eq!(told["wrong"], json!([]));
    assert_eq!(told["release"], world::release_of(&first));
}

#[test]
fn what_is_wrong_with_a_live_site_is_named() {
    let world = World::new();
    let site = site(&[("models/a", "weights"), ("assets/worker.1f.js", "export {}")]);
    world.publish(&site).unwrap();
    for header in [
        "Cross-Origin-Opener-Policy",
        "Cross-Origin-Embedder-Policy",
        "Cross-Origin-Resource-Policy",
        "Cache-Control",
        "Content-Type",
    ] {
        let front = Front::start(world.bucket(), Some(header));
        let told = world.check(&front.url()).unwrap();
        let wrong = told["wrong"].as_array().unwrap();
        let named = |path: &str| {
            wrong.iter().any(|one| {
                let what = one["wrong"].as_str().unwrap().to_lowercase();
                one["path"] == path && what.starts_with(&header.to_lowercase())
            })
        };
        assert!(named("/assets/worker.1f.js") && named("/"), "{header}: {wrong:?}");
    }
    // Other bytes under a name that has their digest.
    let put = s3::Put::when(s3::Condition::Always);
    world.block(world.bucket().put("models/a", "WEIGHTS".into(), &put)).unwrap();
    world.block(world.bucket().delete("assets/worker.1f.js")).unwrap();
    let front = Front::start(world.bucket(), None);
    let told = world.check(&front.url()).unwrap().to_string();
    assert!(told.contains("other bytes"), "{told}");
    assert!(told.contains("answers 404"), "{told}");
    // Whoever publishes again finds out as well, before anything is written.
    let error = world.publish(&site).unwrap_err();
    assert!(error.contains("models/a is there and holds something else"), "{error}");
}

#[test]
fn a_second_fine_tune_sends_only_what_changed() {
    let world = World::new();
    let shared = "s".repeat(90_000);
    let files = |weights: &'static str| {
        let files = vec![("models/shared", shared.as_str()), ("assets/main.1f.js", "m")];
        let own = if weights == "one" { "models/one" } else { "models/two" };
        let mut files: Vec<_> = files;
        files.push((own, weights));
        site(&files)
    };
    world.publish(&files("one")).unwrap();
    let told = world.publish(&files("two")).unwrap();
    let new = told["new"].as_array().unwrap();
    let new: Vec<&str> = new.iter().map(|file| file["path"].as_str().unwrap()).collect();
    let outside: Vec<&&str> = new.iter().filter(|path| !path.starts_with("releases/")).collect();
    assert_eq!(outside, [&"models/two"]);
    assert!(told["bytes_sent"].as_u64().unwrap() < 5_000, "{told}");
    assert!(told["bytes"].as_u64().unwrap() > 90_000, "{told}");
}

#[test]
fn a_dry_run_writes_nothing_and_tells_all() {
    let world = World::new();
    let first = site(&[("models/a", "weights")]);
    let told = world.ask(&first, json!({"publish": {"dry_run": true, "documents": {}}})).unwrap();
    assert_eq!(told["new"].as_array().unwrap().len(), told["files"].as_u64().unwrap() as usize);
    assert!(told["headers"].to_string().contains("Cross-Origin-Embedder-Policy"));
    assert_eq!(world.names(), [""; 0]);
}

#[test]
fn what_is_large_goes_out_compressed() {
    let world = World::new();
    let wasm = "wasm ".repeat(2_100_000);
    let site = site(&[("vendor/1f/ort.wasm", &wasm)]);
    let told = world.publish(&site).unwrap();
    assert!(told["bytes_sent"].as_u64().unwrap() < 200_000, "{told}");
    let object = world.head("vendor/1f/ort.wasm");
    assert_eq!(object.content_encoding.as_deref(), Some("gzip"));
    let front = Front::start(world.bucket(), None);
    assert_eq!(world.check(&front.url()).unwrap()["wrong"], json!([]));
}

#[test]
fn a_rollback_is_one_call() {
    let world = World::new();
    let sites: Vec<_> =
        ["one", "two", "three"].map(|text| site(&[("models/a", "w"), ("isolate.js", text)])).into();
    for site in &sites {
        world.publish(site).unwrap();
        // Releases are told apart by the second in which they were published.
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    let rollback =
        |release: Option<&str>| world.ask(&sites[0], json!({"rollback": {"release": release}}));
    rollback(None).unwrap();
    assert_eq!(world.visible(), world::release_of(&sites[1]));
    assert_eq!(world.get("isolate.js"), b"two");
    rollback(Some(&world::release_of(&sites[0])[..8])).unwrap();
    assert_eq!(world.visible(), world::release_of(&sites[0]));
    assert!(rollback(None).unwrap_err().contains("no release before the current"));
    assert!(rollback(Some("zz")).unwrap_err().contains("has no release zz"));
    let told = world.ask(&sites[0], json!("releases")).unwrap();
    let listed: Vec<_> =
        told["releases"].as_array().unwrap().iter().map(|r| r["release"].clone()).collect();
    assert_eq!(listed, sites.iter().map(|site| json!(world::release_of(site))).collect::<Vec<_>>());
    assert_eq!(told["current"], world::release_of(&sites[0]));
    // One that lost a file is not made the current.
    world.block(world.bucket().delete("models/a")).unwrap();
    let error = rollback(Some(&world::release_of(&sites[2]))).unwrap_err();
    assert!(error.contains("no longer whole: models/a"), "{error}");
}

#[test]
fn what_lacks_a_licence_is_refused() {
    let world = World::new();
    let site = world::site_lacking(&[("models/a", "w")], &["LICENSE, the text"]);
    let error = world.publish(&site).unwrap_err();
    assert!(error.contains("is not published: it lacks LICENSE, the text"), "{error}");
    assert_eq!(world.names(), [""; 0]);
}

#[test]
fn the_page_of_somebody_else_is_not_lost() {
    let world = World::new();
    let put = s3::Put::when(s3::Condition::New);
    world.block(world.bucket().put("index.html", "theirs".into(), &put)).unwrap();
    let error = world.publish(&site(&[("models/a", "w")])).unwrap_err();
    assert!(error.contains("is a page of no release"), "{error}");
    assert_eq!(world.get("index.html"), b"theirs");
}

#[test]
fn a_store_without_conditions_is_refused() {
    let world = World::on(s3::testing::Server::unconditional());
    let error = world.publish(&site(&[("models/a", "w")])).unwrap_err();
    assert!(error.contains("does not hold to conditional writes"), "{error}");
}

/// Killed at each request, before the store has heard of it and after it has done what was asked.
#[test]
fn a_publish_that_is_killed_leaves_a_whole_site() {
    let before = site(&[("models/a", "w"), ("assets/main.1f.js", "one"), ("isolate.js", "one")]);
    let after = site(&[("models/b", "v"), ("assets/main.2e.js", "two"), ("isolate.js", "two")]);
    let (old, new) = (world::release_of(&before), world::release_of(&after));
    let mut seen = BTreeMap::new();
    for carried_out in [false, true] {
        for at in 1.. {
            let world = World::new();
            world.publish(&before).unwrap();
            let spy = Spy::start(&world, at, carried_out);
            let ended = world.publish_through(&after, &spy.url(), |pid| spy.watch(pid));
            let now = world.visible();
            assert!(now == old || now == new, "request {at}: {now}");
            world.assert_whole(&now);
            *seen.entry(now == new).or_insert(0) += 1;
            if ended.is_ok() {
                assert_eq!(now, new);
                break;
            }
            // The next one goes to its end.
            if at % 5 == 0 {
                world.publish(&after).unwrap();
                assert_eq!(world.visible(), new);
                assert_eq!(world.get("isolate.js"), b"two");
            }
        }
    }
    assert!(seen[&false] > 20 && seen[&true] > 2, "{seen:?}");
}

#[test]
fn of_two_publishers_one_wins() {
    let world = World::new();
    let first = site(&[("models/a", "w")]);
    world.publish(&first).unwrap();
    let (ours, theirs) = (site(&[("models/b", "ours")]), site(&[("models/c", "theirs")]));
    // When ours is about to be pointed to, theirs goes through.
    let (url, has_come, go) = Spy::holding(&world, "PUT /bucket/index.html");
    let error = std::thread::scope(|scope| {
        let publishing = scope.spawn(|| world.publish_through(&ours, &url, |_| {}));
        has_come.recv().unwrap();
        world.publish(&theirs).unwrap();
        go.send(()).unwrap();
        publishing.join().unwrap().unwrap_err()
    });
    assert!(error.contains("somebody else published to s3://bucket meanwhile"), "{error}");
    assert_eq!(world.visible(), world::release_of(&theirs));
    world.assert_whole(&world::release_of(&theirs));
    world.publish(&ours).unwrap();
    assert_eq!(world.visible(), world::release_of(&ours));
}

#[test]
fn sites_in_two_folders_of_a_bucket_are_apart() {
    let world = World::new();
    let (a, b) = (site(&[("models/a", "w")]), site(&[("models/a", "v")]));
    world.publish(&a).unwrap();
    world.publish_to(&b, "team/b").unwrap();
    world.assert_whole(&world::release_of(&a));
    let names = world.names();
    assert!(names.contains(&"team/b/index.html".to_string()), "{names:?}");
    assert_eq!(fs::read(world.server.files().join("models/a")).unwrap(), b"w");
}
