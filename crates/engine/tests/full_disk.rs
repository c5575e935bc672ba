//! A disk that fills up under a build, at each point where it can.
//!
//! A real one, since no device and no limit behaves like it: a small tmpfs in a mount namespace of
//! our own; where none may be mounted (most containers), the small `/dev/shm` that is there; else
//! the small disk that `PROBE_DISK` names.

mod workspace;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::{Engine, Error, Options, Outcome, Workers};
use rustix::fs::{FallocateFlags, StatVfs, fallocate, statvfs};
use step::{Class, Failure};
use workspace::{REGISTRY, Workspace};

/// Larger disks are not filled: others may need them, and it takes long.
const SMALL: u64 = 256 << 20;

const MOUNT: &str = "mount -t tmpfs -o size=4m,nr_inodes=2000 none \"$0\" && exec \"$@\"";

/// The programs around one that sees a small disk at `disk`, or why there are none.
fn mounted(disk: &Path) -> Result<Command, String> {
    let mut why = String::new();
    // Root needs no user namespace, and may not be allowed one.
    for flags in ["-m", "-Urm"] {
        let command = || {
            let mut command = Command::new("unshare");
            command.args([flags, "sh", "-c", MOUNT]).arg(disk);
            command
        };
        match command().arg("true").output() {
            Ok(output) if output.status.success() => return Ok(command()),
            Ok(output) => why += &String::from_utf8_lossy(&output.stderr),
            Err(e) => why += &format!("unshare: {e}\n"),
        }
    }
    Err(why)
}

#[test]
fn a_full_disk_costs_nothing_but_the_build() {
    let filler = ["filler", "--exact", "--nocapture", "--test-threads", "1"];
    let this = std::env::current_exe().unwrap();
    let mount = tempfile::tempdir().unwrap();
    let there = |disk: PathBuf, why: &str| {
        let size = statvfs(&disk).map_or(u64::MAX, |disk| disk.f_blocks * disk.f_frsize);
        assert!(
            size <= SMALL,
            "no small disk to fill: {} has {} MiB{why}\nhint: name one with PROBE_DISK",
            disk.display(),
            size >> 20,
        );
        (Command::new(&this), disk)
    };
    let (mut command, disk) = match std::env::var_os("PROBE_DISK") {
        Some(disk) => there(disk.into(), ""),
        None => match mounted(mount.path()) {
            Ok(mut command) => {
                command.arg(&this);
                (command, mount.path().to_path_buf())
            }
            Err(why) => there("/dev/shm".into(), &format!(", and none may be mounted: {why}")),
        },
    };
    let status = command.args(filler).env("TMPDIR", &disk).env("PROBE_FILL", &disk).status();
    assert!(status.unwrap().success());
}

/// Not a test: the process that fills the disk.
#[test]
fn filler() {
    let Some(disk) = std::env::var_os("PROBE_FILL") else { return };
    let ballast = Ballast { dir: tempfile::tempdir_in(&disk).unwrap(), disk: disk.into() };
    let blocks = fill(&ballast, |blocks| ballast.leave_blocks(blocks));
    println!("{blocks} builds short of blocks");
    assert!(blocks >= 20);
    if ballast.free().f_files < 100_000 {
        let files = fill(&ballast, |files| ballast.leave_files(files));
        println!("{files} builds short of inodes");
        assert!(files >= 20);
    } else {
        println!("not tried: a disk short of inodes, this one has {}", ballast.free().f_files);
    }
}

/// What takes the rest of the disk.
struct Ballast {
    dir: tempfile::TempDir,
    disk: PathBuf,
}

impl Ballast {
    fn free(&self) -> StatVfs {
        statvfs(&self.disk).unwrap()
    }

    fn leave_blocks(&self, left: u64) {
        let free = self.free();
        let size = (free.f_bavail - left) * free.f_frsize;
        let file = File::create(self.dir.path().join("blocks")).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, size).unwrap();
    }

    fn leave_files(&self, left: u64) {
        for i in left..self.free().f_favail {
            File::create(self.dir.path().join(i.to_string())).unwrap();
        }
    }

    fn release(&self) {
        for entry in fs::read_dir(self.dir.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
    }
}

/// Builds with nothing left of the disk, with a little left, with more, until it is enough; says
/// how often it was not.
fn fill(ballast: &Ballast, leave: impl Fn(u64)) -> u64 {
    for left in 0.. {
        let recipe = "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\n\
                      [b]\nstep = \"demo/upper\"\ntext = \"a\"\nlevel = 1\n";
        let w = Workspace::new(recipe);
        let rows = format!("{left}: what fills some blocks\n").repeat(400);
        w.write("recipes/rows.txt", &rows);
        leave(left);
        let built = build(&w);
        if let Err(failure) = &built {
            let said = format!("{left} left: {failure:?}");
            assert_eq!(failure.class, Class::Environment, "{said}");
            let full = ["the disk is full", "No space left on device"];
            assert!(full.iter().any(|text| failure.message.contains(text)), "{said}");
            assert!(failure.message.contains(w.path("").to_str().unwrap()), "{said}");
            assert!(failure.hint.as_ref().is_some_and(|h| h.contains("cargo xtask gc")), "{said}");
        }
        // With the disk still full: what is there is whole, and can be tidied up.
        if w.path("artifacts/v1/locks/store").exists() {
            let engine = w.engine();
            assert_whole(&engine);
            engine
                .gc(engine::gc::Keep::default(), false)
                .unwrap_or_else(|e| panic!("{left} left: {e}"));
        }
        ballast.release();
        if built.is_ok() {
            return left;
        }
        build(&w).unwrap_or_else(|failure| panic!("{left} left before: {failure:?}"));
        for target in ["a", "b"] {
            assert!(w.output(target) == rows.to_uppercase(), "{left} left before: {target}");
        }
        assert_whole(&w.engine());
    }
    unreachable!()
}

fn build(w: &Workspace) -> Result<(), Failure> {
    let worker = PathBuf::from(env!("CARGO_BIN_EXE_engine-test-worker"));
    let build = || -> Result<(), Error> {
        let engine = Engine::open(&w.path(""), REGISTRY)?.with_workers(Workers::Fixed(worker));
        let graph = w.graph(&engine, "r");
        engine.build(&graph, Options::default(), &mut |_| {}).and_then(Outcome::into_result)?;
        Ok(())
    };
    build().map_err(|error| match error {
        Error::Failure(failure) => failure,
        other => panic!("{other}"),
    })
}

/// No blob and no result is half there, none lacks a file, nothing is left on its way in.
fn assert_whole(engine: &Engine) {
    let store = engine.store();
    let report = store.scrub(&mut |_| {}).unwrap();
    assert_eq!((report.corrupt, report.strangers, report.lost), (vec![], vec![], vec![]));
    let files = |dir: PathBuf| fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(files(store.root().join("tmp")).count(), 0);
    let results = files(store.root().join("actions")).flat_map(files).count();
    assert_eq!(store.actions().all().unwrap().len(), results);
}
