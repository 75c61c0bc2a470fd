# Makes the table of scripts/bench from "result VMM ROW NUMBER" lines: text on standard output, JSON in the file `json`.
# Exits with 1 if a figure of rvmm's or the floor's is missing. `counted` is 1 if a nanosecond is an instruction.

# Adds a row: name, text, unit, target (the largest value that meets it, or empty), divisor and decimal places for the text.
function row(name, text, unit, target, divide, digits) {
    rows++
    key[rows] = name; title[rows] = text; units[rows] = unit
    goal[rows] = target; by[rows] = divide; places[rows] = digits
}

BEGIN {
    way = counted ? "instructions" : "ns"
    row("boot_ns", "Debian Image, exec to exit", "s", 1200000000, 1000000000, 2)
    row("uptime_ms", "  guest uptime at user space", "s", "", 1000, 2)
    row("user_ns", "  user time", "s", "", 1000000000, 2)
    row("system_ns", "  system time", "s", "", 1000000000, 2)
    row("mmio_read", "MMIO read exit", way, 3400, 1, 0)
    row("mmio_read_traced", "  traced (--trace)", way, "", 1, 0)
    row("mmio_write", "MMIO write exit", way, "", 1, 0)
    row("sbi_forwarded", "SBI call forwarded to user space", way, 3350, 1, 0)
    row("sbi_kernel", "SBI call answered in the kernel", way, "", 1, 0)
    row("dbcn_write", "1 MiB through DBCN", "s", 655000000, 1000000000, 3)
    row("rss_kb", "RSS outside guest RAM, 1 vCPU", "KiB", 1000, 1, 0)
    row("threads", "threads, 1 vCPU", "", 3, 1, 0)
    row("rss_devices_kb", "  with devices, after work", "KiB", 2048, 1, 0)
    row("disk_read_4k", "4,000 x 4 KiB O_DIRECT read", "s", 280000000, 1000000000, 3)
    row("disk_write_4k", "4,000 x 4 KiB O_DIRECT write", "s", 280000000, 1000000000, 3)
    row("disk_read_1m", "64 x 1 MiB O_DIRECT read", "s", 50000000, 1000000000, 3)
    row("disk_buffered", "64 MiB buffered read", "s", "", 1000000000, 3)
    vmms = split("floor floor-aia qemu qemu-pci rvmm rvmm-plic", vmm, " ")
}

{ sub(/\r$/, "") }
$1 == "result" && NF == 4 { value[$2, $3] = $4 }

function shown(v, r) {
    if (v == "") return "-"
    return v ~ /^[0-9]+$/ ? sprintf("%.*f", places[r], v / by[r]) : v
}

function verdict(r,    v) {
    v = value["rvmm", key[r]]
    # On real hardware a nanosecond is not an instruction, and boot times of different machines are not comparable.
    if (goal[r] == "" || v !~ /^[0-9]+$/ || (!counted && units[r] != "KiB" && units[r] != "")) return ""
    return v + 0 <= goal[r] + 0 ? "met" : "missed"
}

function json_value(v) { return v == "" ? "null" : v ~ /^[0-9]+$/ ? v : "\"" v "\"" }

END {
    printf "%-34s %-13s", "", ""
    for (i = 1; i <= vmms; i++)
        printf " %9s", vmm[i]
    printf " %9s\n", "target"
    printf "{\n  \"counted\": %s,\n  \"rows\": [\n", counted ? "true" : "false" > json
    for (r = 1; r <= rows; r++) {
        printf "%-34s %-13s", title[r], units[r]
        printf "    {\"name\": \"%s\"", key[r] > json
        for (i = 1; i <= vmms; i++) {
            v = value[vmm[i], key[r]]
            printf " %9s", shown(v, r)
            printf ", \"%s\": %s", vmm[i], json_value(v) > json
        }
        printf " %9s  %s\n", goal[r] == "" ? "" : "<= " shown(goal[r], r), verdict(r)
        printf ", \"target\": %s, \"verdict\": %s}%s\n", json_value(goal[r]), \
            verdict(r) == "" ? "null" : "\"" verdict(r) "\"", r < rows ? "," : "" > json
        if (value["rvmm", key[r]] !~ /^[0-9]+$/) missing = missing " rvmm:" key[r]
        if (key[r] ~ /^(mmio|sbi)_/ && key[r] !~ /_traced$/ && value["floor", key[r]] !~ /^[0-9]+$/) missing = missing " floor:" key[r]
    }
    print "  ]\n}" > json
    if (missing != "") {
        print "Not measured:" missing
        exit 1
    }
}
