//! Stores on disks that are full, or can't be written. These tests mount small ones of their own,
//! which only root can.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(target_os = "linux")]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Host, private_dir, soon};
use peerbus::{Call, ClosedOutbox, HandlerError, OutboxError, StartError, StoreProblem};
use tempfile::TempDir;

/// A disk in memory, which is gone with this.
struct Disk(TempDir);

impl Disk {
    fn mount(options: &str) -> Option<Self> {
        let disk = Self(private_dir());
        let mounted = disk.run("mount", &["-t", "tmpfs", "-o", options, "peerbus-test"]);
        if !mounted {
            println!("SKIPPED: nothing can be mounted here");
        }
        mounted.then_some(disk)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> bool {
        let mut command = Command::new(program);
        command.args(arguments).arg(self.path()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes all the room that there is.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.path().join("filler")).unwrap();
        for size in [64 * 1024, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.run("umount", &["-l"]);
    }
}

#[tokio::test]
async fn a_full_disk_takes_no_message_and_lets_go_of_those_that_it_has() {
    let Some(disk) = Disk::mount("size=12m,mode=700") else { return };
    let host = Host::new();
    let config = || host.config("alice").outbox(disk.path().join("alice"));
    let alice = config().start().await.unwrap();
    let mut receipts = Vec::new();
    for n in 0..10 {
        receipts.push(alice.send("work", format!("{n}")).guaranteed().await.unwrap());
    }
    disk.fill();
    // There may be some bytes left in the last block.
    let refused = loop {
        match alice.send("work", vec![0; 4096]).guaranteed().await {
            Ok(receipt) => receipts.push(receipt),
            Err(error) => break error,
        }
    };
    let OutboxError::NotStored(why) = &refused else { panic!("{refused}") };
    assert!(!why.may_turn_up, "{refused}");

    let elsewhere = private_dir();
    let bob = host.config("bob").outbox(elsewhere.path().join("bob")).start().await.unwrap();
    let handler = |_: Call| std::future::ready(Ok::<_, HandlerError>(()));
    let _service = bob.serve("work", handler).start().unwrap();
    for receipt in receipts {
        soon(receipt.processed()).await.unwrap();
    }
    alice.shutdown().await;

    let alice = config().start().await.unwrap();
    assert_eq!(alice.store_report().unwrap().pending, 0, "that they are processed is stored");
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    let receipt = soon(async {
        loop {
            if let Ok(receipt) = alice.send("work", "there is room").guaranteed().await {
                return receipt;
            }
            tokio::task::yield_now().await;
        }
    });
    soon(receipt.await.processed()).await.unwrap();
}

#[tokio::test]
async fn a_folder_that_is_read_only_is_refused() {
    let Some(disk) = Disk::mount("size=12m,mode=700") else { return };
    let host = Host::new();
    let config = |name: &str| host.config(name).outbox(disk.path().join(name));
    config("alice").start().await.unwrap().shutdown().await;
    let looked = ClosedOutbox::look(disk.path().join("alice"));
    assert!(looked.is_ok());
    drop(looked);
    assert!(disk.run("mount", &["-o", "remount,ro"]));
    let store = disk.path().join("alice");
    assert!(ClosedOutbox::open(&store).is_err());
    let looked = ClosedOutbox::look(&store).unwrap();
    assert_eq!((looked.messages().count(), looked.damaged()), (0, &[][..]));
    assert!(looked.check_inbox().unwrap().unwrap().damaged.is_empty());
    for name in ["alice", "new"] {
        let Err(StartError::Store(error)) = config(name).start().await else {
            panic!("{name} started");
        };
        let StoreProblem::Io(problem) = &error.problem else { panic!("{error:?}") };
        assert_eq!(problem.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        assert!(error.to_string().contains(name), "{error}");
    }
}
