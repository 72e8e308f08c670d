//! All sinks of a dma stage as one: each transfer goes to the sink of its kind of memory.

use crate::gpu_sink::GpuSink;
use crate::host_ring::HostRing;
use crate::sink::{Batch, Destination, Finished, FinishedBatch, Sink, SinkFault};

/// Host memory and, where there is a GPU, its memory. What one sink has no room for holds up nothing for the other.
#[derive(Debug)]
pub struct Sinks<T> {
    host: HostRing<T>,
    gpu: Option<GpuSink<T>>,
    for_host: Batch<T>,
    for_gpu: Batch<T>,
}

impl<T> Sinks<T> {
    /// Without a GPU sink, transfers to GPU memory end with a fault.
    #[must_use]
    pub fn new(gpu: Option<GpuSink<T>>) -> Self {
        Self { host: HostRing::default(), gpu, for_host: Batch::new(), for_gpu: Batch::new() }
    }
}

impl<T: Send> Sinks<T> {
    fn pass_on(&mut self) {
        if !self.for_host.is_empty() {
            self.host.submit(&mut self.for_host);
        }
        if let Some(gpu) = &mut self.gpu
            && !self.for_gpu.is_empty()
        {
            gpu.submit(&mut self.for_gpu);
        }
    }
}

impl<T: Send> Sink<T> for Sinks<T> {
    fn submit(&mut self, offered: &mut Batch<T>) -> usize {
        let before = offered.len();
        while let Some(transfer) = offered.first() {
            let list = match &transfer.to {
                Destination::Host { .. } => &mut self.for_host,
                Destination::Pages { .. } | Destination::Ring { .. } => &mut self.for_gpu,
            };
            if list.is_full() {
                break;
            }
            list.push(offered.remove(0));
        }
        self.pass_on();
        before - offered.len()
    }

    fn poll(&mut self, finished: &mut FinishedBatch<T>) -> usize {
        let before = finished.len();
        self.host.poll(finished);
        if let Some(gpu) = &mut self.gpu {
            gpu.poll(finished);
        } else {
            while !finished.is_full()
                && let Some(transfer) = self.for_gpu.pop()
            {
                let (context, from) = (transfer.context, transfer.from);
                finished.push(Finished { context, from, result: Err(SinkFault::OtherSink) });
            }
        }
        self.pass_on();
        finished.len() - before
    }

    fn flush(&mut self) {
        if let Some(gpu) = &mut self.gpu {
            gpu.flush();
        }
    }

    fn in_flight(&self) -> usize {
        let gpu = self.gpu.as_ref().map_or(0, Sink::in_flight);
        Sink::in_flight(&self.host) + gpu + self.for_host.len() + self.for_gpu.len()
    }
}
