# Makes the table of scripts/bench network from "result VMM ROW NUMBER" lines: text on standard output.

function shown(v) { return v == "" ? "-" : sprintf("%.1f", v / 1000) }

function against(row, own, peer, least,    mine, theirs) {
    mine = value[own, row]; theirs = value[peer, row]
    if (mine != "" && theirs > 0)
        printf "  %s of %s: %.2f (>= %.2f: %s)\n", own, peer, mine / theirs, least, (mine / theirs >= least) ? "met" : "missed"
}

function line(title, row,    i) {
    printf "%-30s", title ", Mbit/s"
    for (i = 1; i <= vmms; i++) printf " %14s", shown(value[vmm[i], row])
    printf "\n"
    against(row, "rvmm", "qemu-pci", 1.15)
    against(row, "rvmm-vhost", "qemu-pci-vhost", 1)
}

BEGIN { vmms = split("qemu qemu-pci qemu-pci-vhost rvmm rvmm-vhost rvmm-plic", vmm, " ") }

{ sub(/\r$/, "") }
$1 == "result" && NF == 4 { value[$2, $3] = $4 }

END {
    printf "%-30s", "one CPU"
    for (i = 1; i <= vmms; i++) printf " %14s", vmm[i]
    printf "\n"
    line("iperf3 guest to host", "net_out_kbps")
    line("iperf3 host to guest", "net_in_kbps")
}
