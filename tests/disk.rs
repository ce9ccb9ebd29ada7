//! Stores on disks that are full or read-only. These tests mount small disks of their own, which
//! requires root.
#![allow(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]
#![cfg(target_os = "linux")]

mod common;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Host, private_dir, soon};
use peerbus::{
    Call, ClosedOutbox, HandlerError, MessageId, Node, OutboxError, Receipt, StartError,
    StoreProblem,
};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// A disk in memory, unmounted on drop.
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

    /// Fills all free space.
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
    // The last block may have some free bytes.
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

/// Two nodes: alice has her folder on a small disk, bob his elsewhere.
struct Pair {
    host: Host,
    disk: Disk,
    elsewhere: TempDir,
}

impl Pair {
    fn new(size: &str) -> Option<Self> {
        let disk = Disk::mount(&format!("size={size},mode=700"))?;
        Some(Self { host: Host::new(), disk, elsewhere: private_dir() })
    }

    async fn alice(&self) -> Node {
        let config = self.host.config("alice").outbox(self.disk.path().join("alice"));
        config.start().await.unwrap()
    }

    async fn bob(&self) -> Node {
        let config = self.host.config("bob").outbox(self.elsewhere.path().join("bob"));
        config.start().await.unwrap()
    }

    /// Restarts alice; processed messages are no longer in her store.
    async fn restart(&self, alice: Node, pending: u64, dead_letters: u64) -> Node {
        alice.shutdown().await;
        let alice = self.alice().await;
        let report = alice.store_report().unwrap();
        assert_eq!((report.pending, report.dead_letters), (pending, dead_letters));
        assert_eq!(report.damaged, []);
        alice
    }

    /// Fills the disk while no node accepts the messages, lets bob process them all, and then sends
    /// a few more, for which the disk must have room again.
    async fn fill_and_empty(&self, alice: &Node, body: usize) {
        self.fill_further_and_empty(alice, body, Vec::new()).await;
    }

    /// Does the same with messages that are stored already.
    async fn fill_further_and_empty(&self, alice: &Node, body: usize, mut receipts: Vec<Receipt>) {
        while let Ok(receipt) = alice.send("work", vec![1; body]).guaranteed().await {
            receipts.push(receipt);
        }
        let bob = self.bob().await;
        let (processed, mut came) = mpsc::unbounded_channel();
        let handler = move |_: Call| {
            processed.send(()).unwrap();
            std::future::ready(Ok::<_, HandlerError>(()))
        };
        let _service = bob.serve("work", handler).start().unwrap();
        let stored = receipts.len();
        for receipt in receipts {
            soon(receipt.processed()).await.unwrap();
        }
        for _ in 0..3 {
            soon(sent_when_there_is_room(alice, body)).await;
        }
        for _ in 0..stored + 3 {
            soon(came.recv()).await.unwrap();
        }
        assert!(came.try_recv().is_err(), "nothing comes twice");
        bob.shutdown().await;
    }
}

async fn sent_when_there_is_room(alice: &Node, body: usize) {
    loop {
        if let Ok(receipt) = alice.send("work", vec![1; body]).guaranteed().await {
            return receipt.processed().await.unwrap();
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_on_a_small_disk_leave_the_rest_of_it_to_others() {
    let Some(pair) = Pair::new("24m") else { return };
    let alice = pair.alice().await;
    let bob = pair.bob().await;
    let handler = |_: Call| std::future::ready(Err::<(), _>(HandlerError::reject("no", "never")));
    let _service = bob.serve("sour", handler).start().unwrap();
    for _ in 0..5 {
        let receipt = alice.send("sour", vec![1; 500_000]).guaranteed().await.unwrap();
        soon(receipt.processed()).await.unwrap_err();
    }
    bob.shutdown().await;
    pair.fill_and_empty(&alice, 50_000).await;
    let alice = pair.restart(alice, 0, 5).await;
    pair.fill_and_empty(&alice, 500_000).await;
    pair.restart(alice, 0, 5).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_wait_leave_the_rest_of_a_disk_to_others() {
    // One short message, and enough to fill the oldest segments.
    for (waiting, body) in [(1, 5), (20, 500_000)] {
        let Some(pair) = Pair::new("48m") else { return };
        let alice = pair.alice().await;
        for _ in 0..waiting {
            alice.send("nobody", vec![1; body]).guaranteed().await.unwrap();
        }
        pair.fill_and_empty(&alice, 50_000).await;
        let alice = pair.restart(alice, waiting, 0).await;
        pair.fill_and_empty(&alice, 50_000).await;
        pair.restart(alice, waiting, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_wait_between_others_leave_the_rest_of_a_disk_to_others() {
    let Some(pair) = Pair::new("48m") else { return };
    let alice = pair.alice().await;
    let (mut waiting, mut receipts) = (0, Vec::new());
    while let Ok(receipt) = alice.send("work", vec![1; 50_000]).guaranteed().await {
        receipts.push(receipt);
        let kept = alice.send("nobody", vec![1; 10_000]).guaranteed().await;
        waiting += u64::from(kept.is_ok());
    }
    pair.fill_further_and_empty(&alice, 50_000, receipts).await;
    let alice = pair.restart(alice, waiting, 0).await;
    pair.fill_and_empty(&alice, 50_000).await;
    pair.restart(alice, waiting, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_are_remembered_keep_no_bodies_on_a_small_disk() {
    let Some(pair) = Pair::new("48m") else { return };
    let mut alice = pair.alice().await;
    let bob = pair.bob().await;
    let (processed, mut came) = mpsc::unbounded_channel();
    let handler = move |call: Call| {
        processed.send(call.message.header.id).unwrap();
        std::future::ready(Ok::<_, HandlerError>(()))
    };
    let _service = bob.serve("work", handler).start().unwrap();
    let id = |number: u16| {
        MessageId::from_bytes(
            [[7; 14].as_slice(), &number.to_be_bytes()].concat().try_into().unwrap(),
        )
    };
    for life in 0..3u16 {
        // More than the disk can hold.
        for number in life * 1200..(life + 1) * 1200 {
            let receipt = soon(async {
                loop {
                    let message = alice.send("work", vec![1; 50_000]).guaranteed();
                    if let Ok(receipt) = message.once(id(number)).await {
                        return receipt;
                    }
                    tokio::task::yield_now().await;
                }
            });
            soon(receipt.await.processed()).await.unwrap();
            assert_eq!(soon(came.recv()).await, Some(id(number)));
        }
        alice = pair.restart(alice, 0, 0).await;
        // The ids of the last messages are remembered.
        for number in (life + 1) * 1200 - 100..(life + 1) * 1200 {
            let again = alice.send("work", "again").guaranteed().once(id(number)).await.unwrap();
            soon(again.processed()).await.unwrap();
        }
    }
    assert!(came.try_recv().is_err(), "nothing comes twice");
}
