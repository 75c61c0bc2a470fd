//! vhost devices with a driver and a kernel in memory.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::error::Error;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use rvmm_devices::testing::{MemoryHost, create, turn};
use rvmm_devices::virtio::feature;
use rvmm_devices::virtio::net::testing::MemoryNet;
use rvmm_devices::virtio::net::{HEADER, NetBackend, NetworkSource, Offloads, bit};
use rvmm_devices::virtio::testing::{Buffer, Rig, status};
use rvmm_devices::virtio::vhost_kernel::testing::FakeKernel;
use rvmm_devices::{Host, HostError, IrqLine};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// A host whose networks have the requested number of queues.
#[derive(Default, Clone)]
struct Networks(Arc<Mutex<Vec<MemoryNet>>>);

impl Host for Networks {
    fn network_queues(
        &self,
        _: &NetworkSource,
        pairs: u16,
    ) -> Result<Vec<Box<dyn NetBackend>>, HostError> {
        let new: Vec<MemoryNet> = (0..pairs).map(|_| MemoryNet::new().unwrap()).collect();
        self.0.lock().unwrap().extend(new.iter().cloned());
        Ok(new.into_iter().map(|net| Box::new(net) as Box<dyn NetBackend>).collect())
    }
}

fn try_build(text: &str, host: Arc<dyn Host>) -> Result<Rig, String> {
    try_build_on(text, host, &Arc::default())
}

/// A line that the kernel raises for the first events that are attached to it, up to its limit.
#[derive(Default)]
struct Shared {
    line: Mutex<Option<Arc<dyn IrqLine>>>,
    takes: usize,
    events: Mutex<Vec<EventFd>>,
}

impl Shared {
    /// Processes the pending events as the kernel does.
    fn run(&self) {
        for _ in self.events.lock().unwrap().iter().filter(|event| event.read().is_ok()) {
            self.set_level(true);
        }
    }
}

impl IrqLine for Shared {
    fn set_level(&self, high: bool) {
        self.line.lock().unwrap().as_ref().unwrap().set_level(high);
    }

    fn attach_irqfd(&self, event: &EventFd) -> bool {
        let mut events = self.events.lock().unwrap();
        let takes = events.len() < self.takes;
        events.extend(takes.then(|| event.try_clone().unwrap()));
        takes
    }
}

fn try_build_on(text: &str, host: Arc<dyn Host>, line: &Arc<Shared>) -> Result<Rig, String> {
    let built = Rig::try_build(|mut wiring| {
        wiring.host = host;
        *line.line.lock().unwrap() = Some(wiring.irq);
        wiring.irq = Arc::clone(line) as Arc<dyn IrqLine>;
        create(text, wiring)
    });
    built.map_err(|error| error.source().map_or(error.to_string(), ToString::to_string))
}

/// A network card with the additional options `text`, its backends, and the kernel at each of them.
fn card(text: &str) -> (Rig, Vec<MemoryNet>, Vec<FakeKernel>) {
    let host = Networks::default();
    let rig = try_build(&format!("net,tap=t0,vhost=on{text}"), Arc::new(host.clone())).unwrap();
    let nets = host.0.lock().unwrap().clone();
    let kernels = nets.iter().map(MemoryNet::kernel).collect();
    (rig, nets, kernels)
}

fn sockets() -> (Rig, FakeKernel) {
    let host = MemoryHost::default();
    let rig = try_build("vsock,backend=kernel,cid=7", Arc::new(host.clone())).unwrap();
    let sockets = host.sockets();
    assert_eq!(sockets[0].0, 7);
    (rig, sockets[0].1.clone())
}

fn numbers(kernel: &FakeKernel) -> Vec<u16> {
    kernel.rings().iter().map(|rings| rings.queue).collect()
}

#[test]
fn the_kernel_gets_queues_and_kicks_and_its_interrupts_are_levels() {
    let (mut rig, _, kernels) = card("");
    let kernel = &kernels[0];
    rig.start(bit::MRG_RXBUF | bit::CSUM | bit::MAC | bit::CTRL_VQ | feature::EVENT_IDX);
    // The kernel gets one of the device's features, and those of the transport.
    let taken = bit::MRG_RXBUF | feature::EVENT_IDX | feature::VERSION_1;
    assert_eq!(kernel.taken(), Some(taken));
    let rings = kernel.rings();
    assert_eq!(numbers(kernel), [0, 1]);
    for rings in &rings {
        let [descriptors, driver, device] = rig.rings(rings.queue.into());
        assert_eq!((rings.descriptors, rings.driver, rings.device), (descriptors, driver, device));
        assert_eq!(rings.size, 16);
        let kicks = kernel.with_queue(rings.queue, |queue| queue.kick.read().is_ok());
        assert_eq!(kicks, Some(true), "what was there before the start is announced");
    }
    rig.acknowledge();
    for queue in [0, 1] {
        rig.write(0x50, queue.into());
        rig.run();
        let is_kicked = kernel.with_queue(queue, |queue| queue.kick.read().is_ok());
        assert_eq!(is_kicked, Some(true), "nobody else reads a kick");
        kernel.with_queue(queue, |queue| queue.call.write(3).unwrap()).unwrap();
        rig.run();
        assert!(rig.irq.is_high());
        assert_eq!(rig.acknowledge(), 1);
        assert!(!rig.irq.is_high(), "a level");
    }
}

#[test]
fn a_line_raised_by_the_kernel_has_a_cause_and_is_lowered_by_the_driver() {
    // All of the events, or those of the first queue only: the I/O loop handles the others.
    for takes in [2, 1] {
        let line = Arc::new(Shared { takes, ..Shared::default() });
        let host = Networks::default();
        let mut rig = try_build_on("net,tap=t0,vhost=on", Arc::new(host.clone()), &line).unwrap();
        let net = host.0.lock().unwrap()[0].clone();
        let kernel = net.kernel();
        let call = |queue| kernel.with_queue(queue, |queue| queue.call.write(1).unwrap()).unwrap();
        assert_eq!(rig.read(0x60), 0, "nobody works yet");
        for _ in 0..2 {
            rig.start(bit::STATUS);
            rig.acknowledge();
            for queue in [0, 1, 1, 0] {
                assert!(!rig.irq.is_high());
                call(queue);
                line.run();
                rig.run();
                assert!(rig.irq.is_high());
                assert_eq!(rig.acknowledge(), 1);
            }
            // The device's own causes are independent: acknowledging one does not acknowledge the other.
            net.set_link(rig.read(0x104) >> 16 & 1 == 0);
            call(0);
            line.run();
            rig.run();
            rig.write(0x64, 1);
            assert!(rig.irq.is_high());
            assert_eq!(rig.acknowledge(), 3);
            assert!(!rig.irq.is_high());
            call(0);
            line.run();
            assert!(rig.irq.is_high());
            rig.write(0x70, 0);
            assert_eq!((rig.irq.is_high(), rig.read(0x60)), (false, 0), "a reset ends it");
        }
        // A broken device reports only the configuration change.
        rig.start(0);
        call(0);
        line.run();
        kernel.with_queue(1, |queue| queue.error.write(1).unwrap()).unwrap();
        rig.run();
        assert_eq!((rig.irq.is_high(), rig.acknowledge()), (true, 2));
        assert!(!rig.irq.is_high());
        rig.start(0);
        call(0);
        line.run();
        rig.device.reset();
        assert_eq!((rig.irq.is_high(), rig.read(0x60)), (false, 0));
    }
}

#[test]
fn features_that_the_kernel_lacks_are_not_offered() {
    let (mut rig, _, _) = card("");
    let offered = rig.offered();
    assert_eq!(
        offered & (bit::MRG_RXBUF | feature::TRANSPORT),
        bit::MRG_RXBUF | feature::TRANSPORT
    );
    assert_ne!(offered & (bit::GUEST_TSO4 | bit::HOST_TSO4 | bit::CTRL_VQ), 0, "the tap's");
    for (has, expected) in [
        (feature::VERSION_1, feature::VERSION_1),
        (
            feature::VERSION_1 | feature::EVENT_IDX | 1 << 26,
            feature::VERSION_1 | feature::EVENT_IDX,
        ),
    ] {
        let kernel = FakeKernel::with_features(has);
        let mut rig = try_build("net,tap=t0,vhost=on", Arc::new(Old(kernel))).unwrap();
        assert_eq!(rig.offered() & (feature::TRANSPORT | bit::MRG_RXBUF | 1 << 26), expected);
    }
    let old = FakeKernel::with_features(feature::EVENT_IDX);
    let refused = try_build("net,tap=t0,vhost=on", Arc::new(Old(old))).err().unwrap();
    assert!(refused.contains("virtio 1"), "{refused}");
}

/// A host with this kernel behind its network.
struct Old(FakeKernel);

impl Host for Old {
    fn network(&self, _: &NetworkSource) -> Result<Box<dyn NetBackend>, HostError> {
        Ok(Box::new(MemoryNet::with_kernel(self.0.clone()).unwrap()))
    }
}

#[test]
fn commands_link_and_configuration_stay_with_the_device() {
    let (mut rig, nets, _) = card(",mac=02:00:00:00:00:07,mtu=1400");
    let mut config = [0; 12];
    rig.device.read(0x100, &mut config[..8]).unwrap();
    rig.device.read(0x108, &mut config[8..]).unwrap();
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0, 1, 0, 0x78, 5]);
    let all = bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::CTRL_GUEST_OFFLOADS;
    rig.start(all | bit::CTRL_VQ | bit::CTRL_RX | bit::STATUS);
    assert_eq!(nets[0].offloads(), Offloads { csum: true, tso4: true, ..Offloads::default() });
    let order = [&[5, 0][..], &bit::GUEST_CSUM.to_le_bytes()].concat();
    let answer = rig.ask(2, &[Buffer::Read(&order), Buffer::Write(1)]);
    assert_eq!(answer, Some(vec![0]));
    assert_eq!(nets[0].offloads(), Offloads { csum: true, ..Offloads::default() });
    assert_eq!(rig.ask(2, &[Buffer::Read(&[0, 0, 1]), Buffer::Write(1)]), Some(vec![0]));
    rig.acknowledge();
    nets[0].set_link(false);
    rig.run();
    assert_eq!((rig.acknowledge(), rig.read(0x104) >> 16 & 1), (2, 0));
    // The kernel handles frames: the device neither reads nor sends any.
    nets[0].arrive([0; HEADER], &[0; 60]);
    rig.add(0, &[Buffer::Write(2000)]);
    rig.add(1, &[Buffer::Read(&[0; 72])]);
    rig.kick(0);
    rig.kick(1);
    assert_eq!(rig.ask(2, &[Buffer::Read(&[0, 0, 1]), Buffer::Write(1)]), Some(vec![0]));
    assert_eq!((nets[0].reads(), nets[0].sent().len()), (0, 0));
}

#[test]
fn a_reset_stops_the_queues_before_it_returns() {
    let (mut rig, nets, kernels) = card("");
    for _ in 0..3 {
        rig.start(bit::GUEST_CSUM);
        assert_eq!(numbers(&kernels[0]), [0, 1]);
        rig.write(0x70, 0);
        assert_eq!(rig.status(), 0);
        assert_eq!(kernels[0].stops(), [vec![0, 1]]);
        assert_eq!((numbers(&kernels[0]).len(), nets[0].offloads()), (0, Offloads::default()));
    }
    rig.write(0x70, 0);
    assert!(kernels[0].stops().is_empty(), "there is nothing to stop");
}

#[test]
fn a_queue_is_reset_alone_and_the_other_goes_on() {
    let (mut rig, _, kernels) = card("");
    rig.start(feature::RING_RESET);
    for queue in [0, 1] {
        rig.write(0x30, queue);
        assert!(rig.write(0xc0, 1));
        assert_eq!(rig.read(0xc0), 0, "it is over");
        assert_eq!(numbers(&kernels[0]), [u16::from(queue == 0)]);
        assert_eq!(kernels[0].stops(), [vec![u16::try_from(queue).unwrap()]]);
        assert!(rig.set_up(queue));
        assert_eq!(numbers(&kernels[0]).len(), 2);
        rig.write(0x50, queue);
        let queue = u16::try_from(queue).unwrap();
        let is_kicked = kernels[0].with_queue(queue, |queue| queue.kick.read().is_ok());
        assert_eq!(is_kicked, Some(true));
    }
}

#[test]
fn each_pair_has_its_own_backend_and_only_those_in_use_run() {
    let (mut rig, nets, kernels) = card(",queues=3");
    rig.start(bit::MQ | bit::CTRL_VQ);
    for (pair, kernel) in (0..).zip(&kernels) {
        assert_eq!(numbers(kernel), [0, 1]);
        assert_eq!(kernel.rings()[1].descriptors, rig.rings(2 * pair + 1)[0]);
    }
    let used = || nets.iter().map(MemoryNet::is_in_use).collect::<Vec<_>>();
    assert_eq!(used(), [true, false, false]);
    assert_eq!(rig.ask(6, &[Buffer::Read(&[4, 0, 2, 0]), Buffer::Write(1)]), Some(vec![0]));
    assert_eq!(used(), [true, true, false]);
    kernels[2].with_queue(1, |queue| queue.call.write(1).unwrap()).unwrap();
    rig.acknowledge();
    rig.run();
    assert_eq!(rig.acknowledge(), 1);
    rig.write(0x70, 0);
    assert!(kernels.iter().all(|kernel| kernel.stops() == [vec![0, 1]]));

    // A driver without multiqueue has its control queue at index 2, before and after a driver with multiqueue.
    for features in [bit::CTRL_VQ | bit::CTRL_RX, bit::MQ | bit::CTRL_VQ | bit::CTRL_RX] {
        rig.start(features);
        let control = if features & bit::MQ == 0 { 2 } else { 6 };
        let answer = rig.ask(control, &[Buffer::Read(&[0, 0, 1]), Buffer::Write(1)]);
        assert_eq!(answer, Some(vec![0]));
        assert_eq!(numbers(&kernels[1]).is_empty(), control == 2);
        rig.write(0x70, 0);
    }
}

#[test]
fn an_error_of_the_kernel_stops_the_device_until_a_reset() {
    let (mut rig, nets, kernels) = card("");
    rig.start(0);
    kernels[0].with_queue(1, |queue| queue.error.write(1).unwrap()).unwrap();
    rig.run();
    assert_ne!(rig.status() & status::NEEDS_RESET, 0);
    assert_eq!(kernels[0].stops(), [vec![0, 1]]);
    assert_eq!(rig.acknowledge() & 2, 2, "the driver is told");
    rig.start(0);

    // Settings from before a reset have no effect after it.
    kernels[0].with_queue(1, |queue| queue.error.write(1).unwrap()).unwrap();
    rig.start(0);
    assert_eq!(rig.status(), status::RUNNING);

    for broken in [true, false] {
        kernels[0].fail(broken.then_some(ErrorKind::InvalidInput));
        assert!(rig.negotiate(0));
        (0..3).for_each(|queue| assert!(rig.set_up(queue)));
        rig.write(0x70, status::RUNNING);
        while turn(rig.device.as_mut(), 0).unwrap() > 0 {}
        assert_eq!(rig.status() & status::NEEDS_RESET != 0, broken);
    }
    // Without its offloads the kernel would deliver frames that this driver cannot process.
    nets[0].fail(Some(ErrorKind::Other));
    assert!(rig.negotiate(bit::GUEST_CSUM));
    assert!(rig.set_up(0) && rig.set_up(1));
    rig.write(0x70, status::RUNNING);
    while turn(rig.device.as_mut(), 0).unwrap() > 0 {}
    assert_ne!(rig.status() & status::NEEDS_RESET, 0);
}

#[test]
fn options_that_need_every_frame_are_refused_with_the_kernel() {
    let build = |text: &str| try_build(text, Arc::new(MemoryHost::default()));
    for (text, part) in [
        ("net,tap=a,vhost=yes", "on or off"),
        ("net,tap=a,vhost=on,pin=on", "pin=\"on\" is not possible with vhost=on"),
        ("net,tap=a,vhost=on,rx_bps=1000", "rx_bps"),
        ("net,tap=a,vhost=on,tx_bps=1000", "tx_bps"),
        ("net,tap=a,vhost=on,rx_pps=1000", "rx_pps"),
        ("net,tap=a,vhost=on,tx_pps=1000", "tx_pps"),
        ("vsock,backend=kernel,path=v", "path=\"v\" is not possible with backend=kernel"),
        ("vsock,backend=user,path=v", "unix or kernel"),
        ("vsock,backend=kernel,cid=2", "from 3"),
        ("vsock,backend=unix", "a path"),
    ] {
        let refused = build(text).err().unwrap();
        assert!(refused.contains(part), "{text}: {refused}");
    }
    assert!(build("net,tap=a,vhost=on,pin=off,mtu=1400").is_ok());
    assert!(build("net,tap=a,vhost=off,pin=on,rx_bps=1000").is_ok());
    struct Bare;
    impl Host for Bare {}
    let refused = try_build("vsock,backend=kernel", Arc::new(Bare)).err().unwrap();
    assert!(refused.contains("this host has no vhost"), "{refused}");
}

#[test]
fn sockets_in_the_kernel_have_their_cid_and_start_and_stop_together() {
    let (mut rig, kernel) = sockets();
    assert_eq!((rig.read(8), rig.read(0x100), rig.read(0x104)), (19, 7, 0));
    // Streams, and SEQPACKET if the kernel has it; no queue reset.
    assert_eq!(rig.offered(), 3 | feature::TRANSPORT & !feature::RING_RESET);
    for _ in 0..3 {
        rig.start(3 | feature::EVENT_IDX);
        assert_eq!(kernel.taken(), Some(2 | feature::EVENT_IDX | feature::VERSION_1));
        assert_eq!(numbers(&kernel), [0, 1]);
        // The event queue stays with the device.
        rig.add(2, &[Buffer::Write(8)]);
        rig.kick(2);
        assert_eq!(rig.take_used(2), None);
        rig.acknowledge();
        kernel.with_queue(0, |queue| queue.call.write(1).unwrap()).unwrap();
        rig.run();
        assert!(rig.irq.is_high());
        rig.write(0x70, 0);
        assert_eq!((numbers(&kernel).len(), kernel.stops()), (0, vec![vec![0, 1]]));
    }
}

/// The driver's used ring shows that the kernel has returned this number of chains.
fn complete(rig: &Rig, queue: u32, count: u16) {
    let [_, _, used] = rig.rings(queue);
    rig.memory.write_obj(count.to_le(), GuestAddress(used + 2)).unwrap();
}

fn positions(kernel: &FakeKernel) -> Vec<(u16, u16)> {
    kernel.rings().iter().map(|rings| (rings.queue, rings.next)).collect()
}

#[test]
fn a_paused_card_stops_its_queues_in_the_kernel_and_continues_them_where_they_were() {
    let (mut rig, _, kernels) = card("");
    rig.start(bit::MAC);
    let kernel = &kernels[0];
    assert_eq!(positions(kernel), [(0, 0), (1, 0)]);
    complete(&rig, 0, 5);
    rig.device.pause().unwrap();
    assert_eq!(positions(kernel), []);
    assert_eq!(kernel.stops(), [[0, 1]]);
    rig.device.pause().unwrap();
    assert!(kernel.stops().is_empty(), "it is at rest already");
    rig.device.resume();
    assert_eq!(positions(kernel), [(0, 5), (1, 0)]);
    let kicked = kernel.with_queue(0, |queue| queue.kick.read().is_ok());
    assert_eq!(kicked, Some(true), "what came meanwhile is announced");
    rig.device.reset();
    rig.device.pause().unwrap();
    rig.device.resume();
    assert_eq!(positions(kernel), [], "a reset card has no queues to continue");
}

#[test]
fn a_restored_card_continues_its_queues_in_another_kernel() {
    let (mut rig, _, _) = card("");
    rig.start(bit::MAC | bit::CTRL_VQ);
    complete(&rig, 1, 700);
    rig.device.pause().unwrap();
    let state = rig.device.save().unwrap();
    let host = Networks::default();
    let memory = Arc::new(rig.memory.clone());
    let mut other = Rig::build(|mut wiring| {
        (wiring.host, wiring.memory) = (Arc::new(host.clone()), memory);
        create("net,tap=t0,vhost=on", wiring).unwrap()
    });
    let kernel = host.0.lock().unwrap()[0].kernel();
    other.device.restore(state).unwrap();
    assert_eq!(positions(&kernel), [], "not before it is resumed");
    other.device.resume();
    assert_eq!(positions(&kernel), [(0, 0), (1, 700)]);
    assert_eq!(kernel.taken(), Some(feature::VERSION_1));
    assert_eq!(other.read(0x70), status::RUNNING);
}

#[test]
fn sockets_in_the_kernel_pause_and_cannot_be_saved() {
    let (mut rig, kernel) = sockets();
    rig.start(0);
    complete(&rig, 0, 9);
    rig.device.pause().unwrap();
    assert_eq!(positions(&kernel), []);
    let why = rig.device.save().unwrap_err().to_string();
    assert_eq!(why, "its connections are in the host's kernel (use backend=unix)");
    rig.device.resume();
    assert_eq!(positions(&kernel), [(0, 9), (1, 0)]);
}

#[test]
fn a_reset_of_the_machine_opens_a_network_again_that_was_lost_and_no_other() {
    let host = Networks::default();
    let mut rig = try_build("net,tap=t0", Arc::new(host.clone())).unwrap();
    let opened = || host.0.lock().unwrap().len();
    rig.device.reset();
    assert_eq!(opened(), 1);
    rig.start(bit::STATUS);
    rig.add(0, &[Buffer::Write(2000)]);
    rig.kick(0);
    host.0.lock().unwrap()[0].fail(Some(ErrorKind::NotConnected));
    rig.run();
    assert_eq!(rig.read(0x104) >> 16 & 1, 0, "the link is down");
    rig.write(0x70, 0);
    assert_eq!(opened(), 1, "a reset by the driver opens nothing");
    rig.device.reset();
    assert_eq!(opened(), 2);
    rig.start(bit::STATUS);
    rig.kick(0);
    assert_eq!(rig.read(0x104) >> 16 & 1, 1, "the link is up");
}
