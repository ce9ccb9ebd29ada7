//! A store's files: missing, damaged, deleted or old ones.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{Host, private_dir, soon};
use peerbus::{Call, ClosedOutbox, HandlerError, MessageId, OutboxError, StoreProblem};

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_name() != "spare" {
            fs::copy(entry.path(), &target).unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o600)).unwrap();
        }
    }
}

/// All files below a folder, with their contents.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        match entry.path().is_dir() {
            true => all.extend(contents(&entry.path())),
            false => all.push((entry.path(), fs::read(entry.path()).unwrap())),
        }
    }
    all.sort();
    all
}

fn segments(journal: &Path) -> Vec<PathBuf> {
    let files = contents(journal).into_iter().map(|(path, _)| path);
    files.filter(|path| path.extension().is_some_and(|it| it == "segment")).collect()
}

/// Verifies an outbox: whether damage is reported, the reported loss, and the readable bodies.
fn look(store: &Path) -> (bool, Option<u64>, Vec<String>) {
    let outbox = ClosedOutbox::look(store).unwrap();
    assert_eq!(outbox.torn(), 0);
    let body = |message| Some(String::from_utf8(outbox.read(&message).ok()?.1.into()).unwrap());
    let bodies = outbox.messages().filter_map(body).collect();
    (!outbox.damaged().is_empty(), outbox.lost(), bodies)
}

/// The store of a node that was started and closed three times. It keeps 30 messages, and the
/// record of 30 processed ones.
async fn kept(host: &Host, store: &Path) -> Vec<String> {
    let mut bodies = Vec::new();
    for life in 0..3 {
        let node = host.config("alice").outbox(store).start().await.unwrap();
        let handler = |_: Call| std::future::ready(Ok::<_, HandlerError>(()));
        let _service = node.serve("here", handler).start().unwrap();
        for n in 0..10 {
            let body = format!("message {n} of life {life}");
            node.send("nobody", body.clone()).guaranteed().await.unwrap();
            bodies.push(body);
            let receipt = node.send("here", "").guaranteed().await.unwrap();
            soon(receipt.processed()).await.unwrap();
        }
        node.shutdown().await;
    }
    bodies
}

#[tokio::test]
async fn nothing_of_a_closed_store_is_lost_without_a_word() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    let bodies = kept(&host, &store).await;
    assert_eq!(look(&store), (false, Some(0), bodies.clone()));
    let outbox = segments(&store.join("outbox"));
    assert_eq!(outbox.len(), 3);

    let missing = |found: &[String]| bodies.iter().filter(|it| !found.contains(it)).count() as u64;
    // Each segment has 20 messages, of which 10 were processed.
    for segment in &outbox {
        let whole = fs::read(segment).unwrap();
        for cut in (0..whole.len()).step_by(whole.len() / 60) {
            fs::write(segment, &whole[..cut]).unwrap();
            let (damaged, lost, found) = look(&store);
            let lost = lost.unwrap();
            assert!(damaged && lost >= missing(&found) && lost <= 20, "cut at {cut}");
        }
        fs::remove_file(segment).unwrap();
        let (damaged, lost, found) = look(&store);
        assert_eq!((damaged, lost, missing(&found)), (true, Some(20), 10));
        fs::write(segment, &whole).unwrap();
    }
    let mut seed = 1_u64;
    let mut random = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed as usize % below
    };
    for _ in 0..200 {
        let segment = &outbox[random(3)];
        let whole = fs::read(segment).unwrap();
        let mut flipped = whole.clone();
        flipped[random(whole.len())] ^= 1 << random(8);
        fs::write(segment, flipped).unwrap();
        let (damaged, lost, found) = look(&store);
        assert!(found == bodies || damaged, "{found:?}");
        assert!(lost >= Some(missing(&found)), "{lost:?}: {found:?}");
        fs::write(segment, whole).unwrap();
    }
    fs::remove_file(store.join("outbox/manifest")).unwrap();
    assert_eq!(look(&store), (true, None, bodies));
}

#[tokio::test]
async fn nothing_of_a_closed_inbox_is_lost_without_a_word() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    kept(&host, &store).await;
    let check = || ClosedOutbox::look(&store).unwrap().check_inbox().unwrap().unwrap();
    let sound = check();
    assert_eq!((sound.damaged.len(), sound.forgotten, sound.torn), (0, Some(0), 0));
    let inbox = segments(&store.join("inbox"));
    let last = inbox.last().unwrap();
    let whole = fs::read(last).unwrap();
    for cut in (0..whole.len()).step_by(whole.len() / 60) {
        fs::write(last, &whole[..cut]).unwrap();
        let report = check();
        assert!(!report.damaged.is_empty() && report.torn == 0, "cut at {cut}");
    }
    fs::remove_file(last).unwrap();
    let report = check();
    assert!(report.damaged[0].missing && report.forgotten >= Some(10), "{report:?}");
    // The node reports it too.
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    let told = node.store_report().unwrap();
    assert!(told.damaged[0].missing && told.forgotten >= Some(10) && told.lost == Some(0));
    node.shutdown().await;
}

#[tokio::test]
async fn a_store_of_the_first_format_goes_on_in_the_new_one() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    copy(Path::new("tests/fixtures/store-1"), &store);
    let (damaged, lost, found) = look(&store);
    let mut wanted: Vec<_> = (0..3).map(|n| format!("pending {n}")).collect();
    wanted.extend(["stored once".into(), "too late".into()]);
    wanted.extend((3..5).map(|n| format!("pending {n}")));
    assert_eq!((damaged, lost, &found), (false, Some(0), &wanted));

    let node = host.config("alice").outbox(&store).start().await.unwrap();
    let report = node.store_report().unwrap().clone();
    assert_eq!((report.pending, report.dead_letters, report.damaged.len()), (6, 1, 0));
    let id = MessageId::from_bytes([7; 16]);
    node.send("nobody", "stored once").guaranteed().once(id).await.unwrap();
    assert_eq!(node.outbox_size().pending, 6, "its id is remembered");
    let handled = Arc::new(Mutex::new(Vec::new()));
    let handling = handled.clone();
    let handler = move |call: Call| {
        handling.lock().unwrap().push(call.message.text().into_owned());
        std::future::ready(Ok::<_, HandlerError>(()))
    };
    let _service = node.serve("nobody", handler).concurrency(1).start().unwrap();
    let receipt = node.send("nobody", "new").guaranteed().await.unwrap();
    soon(receipt.processed()).await.unwrap();
    node.shutdown().await;

    wanted.retain(|body| body != "too late");
    wanted.push("new".into());
    handled.lock().unwrap().sort();
    wanted.sort();
    assert_eq!(*handled.lock().unwrap(), wanted);
    assert_eq!(look(&store), (false, Some(0), vec!["too late".into()]));
    for journal in ["outbox", "inbox"] {
        let last = segments(&store.join(journal)).pop().unwrap();
        assert_eq!(fs::read(&last).unwrap()[8], 2, "its version");
        let whole = fs::read(&last).unwrap();
        fs::write(&last, &whole[..whole.len() - 1]).unwrap();
    }
    let looked = ClosedOutbox::look(&store).unwrap();
    assert_eq!(looked.damaged().len(), 1);
    assert_eq!(looked.check_inbox().unwrap().unwrap().damaged.len(), 1);
}

#[tokio::test]
async fn a_store_without_its_lock_file_is_a_store() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    let bodies = kept(&host, &store).await;
    let remove = || {
        for journal in ["outbox", "inbox"] {
            fs::remove_file(store.join(journal).join("journal.lock")).unwrap();
        }
    };
    remove();
    assert_eq!(look(&store), (false, Some(0), bodies));
    drop(ClosedOutbox::open(&store).unwrap());
    fs::remove_file(store.join("outbox/journal.lock")).unwrap();
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    assert_eq!(node.store_report().unwrap().pending, 30);
    assert!(store.join("outbox/journal.lock").exists());
    node.shutdown().await;
}

#[tokio::test]
async fn whoever_only_looks_changes_nothing_and_waits_for_nobody() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    node.send("nobody", "kept").guaranteed().await.unwrap();
    let error = ClosedOutbox::look(&store).err().unwrap();
    assert!(matches!(error.problem, StoreProblem::InUse), "{error}");
    node.shutdown().await;

    let before = contents(&store);
    let mut looked = ClosedOutbox::look(&store).unwrap();
    let other = ClosedOutbox::look(&store).unwrap();
    assert!(matches!(ClosedOutbox::open(&store).err().unwrap().problem, StoreProblem::InUse));
    let message = looked.messages().next().unwrap();
    assert_eq!(&looked.read(&message).unwrap().1[..], b"kept");
    assert!(looked.purge(&message).is_err());
    assert!(looked.identity_problem().is_none());
    drop((looked, other));
    assert_eq!(contents(&store), before);

    fs::write(store.join("identity"), "").unwrap();
    assert!(ClosedOutbox::look(&store).unwrap().identity_problem().is_some());
    fs::remove_file(store.join("identity")).unwrap();
    assert!(ClosedOutbox::look(&store).unwrap().identity_problem().is_none());
}

#[tokio::test]
async fn nothing_is_stored_in_a_folder_that_was_removed() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    node.send("nobody", "stored").guaranteed().await.unwrap();
    fs::remove_dir_all(&store).unwrap();
    let send = || async { node.send("nobody", "not stored").guaranteed().await };
    let is_gone = |error: &OutboxError| error.to_string().contains("was removed or replaced");
    for _ in 0..3 {
        let error = send().await.unwrap_err();
        assert!(is_gone(&error), "{error}");
    }
    // Nor in another folder at the same path.
    fs::create_dir_all(store.join("outbox")).unwrap();
    let error = send().await.unwrap_err();
    assert!(is_gone(&error), "{error}");
    assert_eq!(contents(&store), []);
    node.shutdown().await;

    let node = host.config("alice").outbox(&store).start().await.unwrap();
    assert_eq!(node.store_report().unwrap().pending, 0);
    node.send("nobody", "stored").guaranteed().await.unwrap();
    // A folder that is moved away and back is the same.
    let aside = dir.path().join("aside");
    fs::rename(&store, &aside).unwrap();
    let error = node.send("nobody", "not stored").guaranteed().await.unwrap_err();
    assert!(is_gone(&error), "{error}");
    fs::rename(&aside, &store).unwrap();
    node.send("nobody", "stored too").guaranteed().await.unwrap();
    node.shutdown().await;
    let (damaged, _, found) = look(&store);
    assert!(!damaged && found.contains(&"stored".into()) && found.contains(&"stored too".into()));
}

/// All files and folders below a folder, with their modes.
fn modes(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        all.push((entry.path(), entry.metadata().unwrap().mode() & 0o777));
        if entry.path().is_dir() {
            all.extend(modes(&entry.path()));
        }
    }
    all
}

#[tokio::test]
async fn a_store_is_for_its_user_alone_whatever_the_folder_was_before() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    fs::DirBuilder::new().mode(0o755).create(&store).unwrap();
    fs::DirBuilder::new().mode(0o755).create(store.join("outbox")).unwrap();
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    node.send("nobody", "stored").guaranteed().await.unwrap();
    for (path, mode) in modes(&store) {
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode, wanted, "{}", path.display());
    }
    node.shutdown().await;
}

#[tokio::test]
async fn a_folder_that_others_can_change_is_no_store() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    kept(&host, &store).await;
    let refused = async |folder: &Path, why: &str| {
        for outcome in [
            ClosedOutbox::open(&store).err().map(|error| error.problem.to_string()),
            host.config("alice").outbox(&store).start().await.err().map(|error| {
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            }),
        ] {
            let told = outcome.unwrap();
            assert!(told.contains(why), "{}: {told}", folder.display());
        }
    };
    for folder in [dir.path().to_owned(), store.clone(), store.join("outbox")] {
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        refused(&folder, "chmod ").await;
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        if chown(&folder, Some(65534), None).is_err() {
            println!("SKIPPED: only root can give a folder away");
            continue;
        }
        refused(&folder, "belongs to another user (uid 65534)").await;
        chown(&folder, Some(0), None).unwrap();
    }
    assert_eq!(look(&store).2.len(), 30);
}

#[tokio::test]
async fn a_link_in_the_place_of_a_stores_file_changes_nothing_elsewhere() {
    let (host, dir) = (Host::new(), private_dir());
    let store = dir.path().join("alice");
    kept(&host, &store).await;
    let precious = dir.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    for name in ["spare", "manifest.new"] {
        for journal in ["outbox", "inbox"] {
            let path = store.join(journal).join(name);
            let _none = fs::remove_file(&path);
            symlink(&precious, path).unwrap();
        }
    }
    let node = host.config("alice").outbox(&store).start().await.unwrap();
    node.send("nobody", "stored").guaranteed().await.unwrap();
    node.shutdown().await;
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
    for name in ["manifest", "journal.lock"] {
        let path = store.join("outbox").join(name);
        fs::remove_file(&path).unwrap();
        symlink(&precious, path).unwrap();
        for error in [
            ClosedOutbox::open(&store).err().unwrap().problem.to_string(),
            ClosedOutbox::look(&store).err().unwrap().problem.to_string(),
        ] {
            assert!(error.contains("is a symbolic link: remove it"), "{name}: {error}");
        }
        fs::remove_file(store.join("outbox").join(name)).unwrap();
    }
    assert_eq!(fs::read(&precious).unwrap(), b"precious");
}
