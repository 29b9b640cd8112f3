// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/* /dev/tally: a sum that programs add to by ioctl, small enough to be read at once, with a fault to be found. */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/overflow.h>
#include <linux/uaccess.h>

#include "tally.h"

static DEFINE_MUTEX(tally_lock);
static s64 tally_total;

static long tally_add(struct tally_add __user *user)
{
	struct tally_add request;
	long status = 0;

	if (copy_from_user(&request, user, sizeof(request)))
		return -EFAULT;
	mutex_lock(&tally_lock);
	if (check_add_overflow(tally_total, (s64)request.amount, &request.total))
		status = -EOVERFLOW;
	else if (copy_to_user(user, &request, sizeof(request)))
		status = -EFAULT;
	else
		tally_total = request.total;
	mutex_unlock(&tally_lock);
	return status;
}

static noinline void tally_crash(void)
{
	WRITE_ONCE(*(int *)NULL, 1);
}

static long tally_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	void __user *user = (void __user *)argument;
	s64 total;

	switch (command) {
	case TALLY_ADD:
		return tally_add(user);
	case TALLY_READ:
		mutex_lock(&tally_lock);
		total = tally_total;
		mutex_unlock(&tally_lock);
		return put_user(total, (__s64 __user *)user);
	case TALLY_CRASH:
		tally_crash(); /* called and not jumped to, so that this function is on the stack as well */
		return 0;
	default:
		return -ENOTTY;
	}
}

static const struct file_operations tally_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = tally_ioctl,
};

static struct miscdevice tally_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "tally",
	.fops = &tally_operations,
};

module_misc_device(tally_device);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A sum behind a device file");
