// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* use_tally add AMOUNT [TIMES] | read | crash | unknown | bad-pointer: one ioctl of /dev/tally, and what comes of it. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "tally.h"

static int said(int result)
{
	if (result)
		puts(strerrorname_np(errno));
	return result ? 1 : 0;
}

int main(int count, char **words)
{
	const char *what = count > 1 ? words[1] : "";
	int file = open("/dev/tally", O_RDWR);

	if (file < 0)
		return said(file);
	if (!strcmp(what, "add") && count > 2) {
		struct tally_add request = { .amount = strtoll(words[2], NULL, 0) };
		long times = count > 3 ? strtol(words[3], NULL, 0) : 1;

		while (times-- > 0)
			if (ioctl(file, TALLY_ADD, &request))
				return said(-1);
		printf("%lld\n", (long long)request.total);
		return 0;
	}
	if (!strcmp(what, "read")) {
		__s64 total;

		if (ioctl(file, TALLY_READ, &total))
			return said(-1);
		printf("%lld\n", (long long)total);
		return 0;
	}
	if (!strcmp(what, "crash"))
		return said(ioctl(file, TALLY_CRASH));
	if (!strcmp(what, "unknown"))
		return said(ioctl(file, _IO('t', 99)));
	if (!strcmp(what, "bad-pointer"))
		return said(ioctl(file, TALLY_ADD, (void *)1));
	fputs("use_tally add AMOUNT [TIMES] | read | crash | unknown | bad-pointer\n", stderr);
	return 2;
}
