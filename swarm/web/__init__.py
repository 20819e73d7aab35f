"""What our web servers share: the API's and the health page's."""
