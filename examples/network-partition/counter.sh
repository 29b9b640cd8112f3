#!/bin/sh
# A counter that is kept by several nodes, each of which answers while the others cannot be reached.
# Every node counts for itself and keeps what it has last heard of the others; the value is the sum. What is heard twice,
# late or in another order changes nothing: a count only grows, so the larger one is the newer one.
#
#   counter.sh NAME PEER-ADDRESS...     run the node NAME
#
# http://NODE/cgi-bin/add adds one, /cgi-bin/value is the sum, /cgi-bin/counts is all that the node knows.
set -e
name=$1
shift
root=/var/counter
mkdir -p $root/counts $root/cgi-bin
echo 0 >$root/counts/$name

cgi() { # NAME: the program on standard input, for requests to /cgi-bin/NAME
    { printf '#!/bin/sh\nprintf "Content-Type: text/plain\\r\\n\\r\\n"\ncd %s/counts\n' "$root"; cat; } >$root/cgi-bin/"$1"
    chmod +x $root/cgi-bin/"$1"
}
cgi add <<END
until mkdir ../lock 2>/dev/null; do usleep 1000; done  # one at a time
echo \$((\$(cat $name) + 1)) >../new && mv ../new $name && cat $name
rmdir ../lock
END
cgi value <<'END'
total=0
for count in *; do total=$((total + $(cat $count))); done
echo $total
END
cgi counts <<'END'
for count in *; do echo $count $(cat $count); done
END

hear() { # PEER-ADDRESS: take over what it knows; nothing when it cannot be reached
    timeout 4 wget -q -O - "http://$1/cgi-bin/counts" | while read -r node count; do
        known=$(cat $root/counts/"$node" 2>/dev/null || echo 0)
        if [ "$node" != "$name" ] && [ "$count" -gt "$known" ]; then
            echo "$count" >$root/heard && mv $root/heard $root/counts/"$node"
        fi
    done
}

httpd -p 80 -h $root
while true; do
    for peer; do hear "$peer" || true; done
    usleep 200000
done
