# Adds up Rss in /proc/PID/smaps over all mappings except guest memory, in KiB. Guest memory is the one run of adjacent, writable
# mappings that together are as large as the guest's memory (mem_mb), including the files that are mapped into it.
# With details=1 it prints one line per mapping instead, in no particular order.

function hex(text,    i, value) {
    value = 0
    for (i = 1; i <= length(text); i++)
        value = value * 16 + index("0123456789abcdef", substr(text, i, 1)) - 1
    return value
}

/^[0-9a-f]+-[0-9a-f]+ / {
    split($1, range, "-")
    count++
    from[count] = hex(range[1])
    to[count] = hex(range[2])
    mode[count] = $2
    label[count] = $1 " " $2 " " $6
    next
}
/^Rss:/ { rss[count] = $2 }
/^Private_Dirty:/ { dirty[count] = $2 }

END {
    for (i = 1; i <= count; i = next_run) {
        size = 0
        for (next_run = i; next_run <= count; next_run++) {
            if (mode[next_run] !~ /^rw/ || (next_run > i && from[next_run] != to[next_run - 1]))
                break
            size += to[next_run] - from[next_run]
        }
        if (next_run == i)
            next_run++
        guest = size >= mem_mb * 1024 * 1024
        for (j = i; j < next_run; j++) {
            if (!guest)
                sum += rss[j]
            if (details && rss[j] > 0)
                printf "%s%6d KiB (dirty %d) %s\n", guest ? "guest " : "      ", rss[j], dirty[j], label[j]
        }
        guests += guest
    }
    if (guests != 1) {
        print "no-guest-memory-found"
        exit 1
    }
    if (!details)
        print sum
}
