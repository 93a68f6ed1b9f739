//! What one work request costs in shared memory, both ends in one thread.
#![allow(missing_docs, reason = "the macros of criterion make undocumented items")]

use std::{hint::black_box, sync::atomic::Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use verbs_abi::shm::{
    Window,
    cq::{CQ_LEN, CqArea},
    cqe::{CompletionReader, CompletionWriter, Cqe},
    doorbell::{self, Doorbells},
    queue::{Geometry, QueueArea},
    wqe::{SendWqe, Sge},
};

fn send_queue(c: &mut Criterion) {
    let geometry = Geometry::new(128, 128, 1, 1, 64).expect("small queues");
    let area = QueueArea::new(&Window::heap(geometry.len()), 0, geometry).expect("it fits");
    let (mut posted, mut read) = (SendWqe::default(), SendWqe::default());
    posted.push_sge(Sge { addr: 1, length: 8, lkey: 2 });
    let mut tail = 0;
    c.bench_function("post and fetch a one-SGE WQE", |b| {
        b.iter(|| {
            let blocks = posted.encode(|i, block| area.write_sq_block(tail + i, block));
            area.header.sq_tail().store(tail + blocks, Ordering::Release);
            assert_eq!(area.read_send(tail, &mut read), Ok(true));
            tail += blocks;
            black_box(read.wr_id)
        });
    });
}

fn completions(c: &mut Criterion) {
    let ring = Window::heap(128 * 32);
    let cq = CqArea::new(&Window::heap(CQ_LEN), 0).expect("it fits");
    let mut writer = CompletionWriter::new(ring.clone(), 0);
    let mut reader = CompletionReader::new(ring, 0);
    c.bench_function("write and poll a completion", |b| {
        b.iter(|| {
            writer.push(black_box(&Cqe::default()));
            let _ = black_box(cq.publish(0, false));
            reader.pop().expect("just written")
        });
    });
}

fn doorbells(c: &mut Criterion) {
    let arena = Window::heap(4096 + doorbell::LEN);
    let bells = Doorbells::new(&arena).expect("it fits");
    c.bench_function("ring and answer one of 16,384 doorbells", |b| {
        b.iter(|| {
            bells.ring(black_box(9_999));
            let mut found = 0;
            bells.take(&mut 0, 1, |slot| found = slot);
            found
        });
    });
}

criterion_group!(benches, send_queue, completions, doorbells);
criterion_main!(benches);
